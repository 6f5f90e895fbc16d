"""The CIFAR-10 demo of MoCo in plain torch, or with the package's step between the same draws.

    python scripts/plain_demo.py IMAGES [--step plain|package] [--knn] [--seed N] [--epochs N] …

What a run of this package is compared with where no figures are published: the run of
examples/moco_in_one_file.py, with the official demo's head and on a part of CIFAR-10. With
``--step plain`` nothing of the package is imported. Two seeds show how much such a run differs from
itself.

``--step package`` has the same images, crops, colours, order, shuffles, first weights and first
queue, and the package's encoders, BatchNorm, queue, loss, averaging and optimizer in between: what
is left of a difference is the step's.

Prints a line an epoch and, as its last line, one JSON object: ``losses``, the mean of each epoch,
``knn``, top-1 in percent (after the last epoch; with ``--knn`` before training and after each), and
``step``, ``seed``, ``seconds``, ``torch``, ``torchvision``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import moco_in_one_file as plain


class PackageStep:
    """The step by the package's parts."""

    def __init__(self, net: nn.Module, queue: Tensor, args: argparse.Namespace) -> None:
        from moco_scale.engines.base import EngineSettings
        from moco_scale.engines.ddp import DDPEngine
        from moco_scale.methods.key_queue import KeyQueue
        from moco_scale.methods.moco import MoCo
        from moco_scale.models.batchnorm import set_groups
        from moco_scale.models.encoder import build_encoder

        dim, device = queue.shape[1], queue.device
        query = build_encoder("resnet18", stem="cifar", head=args.head, dim=dim, seed=args.seed)
        expected = net.state_dict()
        for name, value in query.state_dict().items():
            theirs = expected[name.removeprefix("backbone.").replace("head.", "fc.")]
            if not torch.equal(value, theirs.cpu()):
                raise AssertionError(f"{name} does not begin where the plain network's does")
        moco = MoCo(query).to(device)
        self.query: nn.Module = moco.query
        set_groups(moco, args.batch_size // args.bn_splits, args.batch_size)
        settings = EngineSettings(plain.SGD_MOMENTUM, plain.WEIGHT_DECAY, precision=args.precision)
        self.engine = DDPEngine(moco, settings, device)
        self.queue = KeyQueue(len(queue), dim, args.seed, device)
        self.queue.keys.copy_(queue)

    def step(self, views: Sequence[Tensor], shuffles: Sequence[Tensor], lr: float) -> float:
        terms = range(len(shuffles))
        queries = self.engine.query(*(views[term] for term in terms), micro_batch=0)
        keys = [self.engine.key(views[1 - i][p])[p.argsort()] for i, p in enumerate(shuffles)]
        images = np.arange(len(keys[0]))  # which nothing is asked about
        contrasts = [
            self.queue.contrast(q, k, plain.TEMPERATURE, images)
            for q, k in zip(queries, keys, strict=True)
        ]
        loss = torch.stack([contrast.loss.mean() for contrast in contrasts]).sum()
        self.engine.backward(loss)
        if not self.engine.step(lr):
            raise AssertionError("a step was skipped")
        self.engine.ema(plain.KEY_MOMENTUM)
        for k in keys:
            self.queue.enqueue(k)
        return loss.item()


def main() -> None:
    parser = plain.make_parser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("--step", choices=("plain", "package"), default="plain")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.set_defaults(
        head="linear", per_class=1000, epochs=8, of=8, batch_size=128, precision="bf16"
    )
    args = plain.parse(parser)
    torch.set_num_threads(args.threads)
    result = plain.train(args, plain.plain if args.step == "plain" else PackageStep)
    print(json.dumps({"step": args.step, **result}))


if __name__ == "__main__":
    main()
