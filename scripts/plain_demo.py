"""The CIFAR-10 demo of MoCo written out in plain torch, for the losses of its epochs.

    python scripts/plain_demo.py IMAGES [--step plain|package] [--knn] [--seed N] [--epochs N] …

What a run of this package is compared with where no figures are published: one process,
torchvision's network and transforms on PIL images, torch's DataLoader, nn.BatchNorm2d applied to
parts of the batch, the queue as one matrix, cross-entropy over concatenated logits, and every draw
from torch's one generator. With ``--step plain`` nothing of the package is imported. Two seeds show
how much such a run differs from itself.

``--step package`` has the same images, crops, colours, order, shuffles, first weights and first
queue, and the package's encoders, BatchNorm, queue, loss, averaging and optimizer in between: what
is left of a difference is the step's.

IMAGES is a folder of train/CLASS/*; the first --per-class files of each class, by name, are the
training set. --epochs of a cosine over --of epochs are run. With --knn, each epoch ends with a
weighted kNN (k = 200, T = 0.1, on the 128-d output) of all of val/CLASS/* in the training set.

Prints a line an epoch and, as its last line, one JSON object: ``losses``, the mean of each epoch,
``knn``, top-1 in percent before training and after each epoch, and ``step``, ``seed``, ``seconds``,
``torch``, ``torchvision``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet18

DIM, QUEUE, MOMENTUM, TEMPERATURE = 128, 4096, 0.99, 0.1
SGD_MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def images_of(folder: Path, per_class: int | None) -> tuple[list[Image.Image], Tensor]:
    """The first images of each class, and int64 labels."""
    images, labels = list[Image.Image](), list[int]()
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for label, of in enumerate(classes):
        for path in sorted(of.iterdir())[:per_class]:
            images.append(Image.open(path).convert("RGB"))
            labels.append(label)
    return images, torch.tensor(labels)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image."""

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images
        self.view = transforms.Compose(
            [
                transforms.RandomResizedCrop(32),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.view(self.images[i]), self.view(self.images[i])


class SplitBatchNorm(nn.BatchNorm2d):
    """Normalises so many equal parts of a batch on their own."""

    def __init__(self, features: int, splits: int) -> None:
        super().__init__(features)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(SplitBatchNorm, self).forward(p) for p in x.chunk(self.splits)])


class Neighbours:
    """The demo's kNN: images of val among those of train."""

    def __init__(self, folder: Path, per_class: int, device: torch.device) -> None:
        self.whole = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        self.bank, self.labels = images_of(folder / "train", per_class)
        self.queries, self.truth = images_of(folder / "val", None)
        self.device = device

    @torch.no_grad()
    def top1(self, net: nn.Module, half: bool) -> float:
        """In percent, of a network, which is left in training mode."""
        net.eval()
        bank, queries = (
            self._features(net, self.bank, half),
            self._features(net, self.queries, half),
        )
        net.train()
        right, classes = 0, int(self.labels.max()) + 1
        for query, truth in zip(queries.split(500), self.truth.split(500), strict=True):
            weight, place = (query @ bank.T).topk(min(200, len(bank)))
            votes = torch.zeros(len(query), classes)
            votes.scatter_add_(1, self.labels[place], (weight / 0.1).exp())
            right += int((votes.argmax(1) == truth).sum())
        return 100 * right / len(self.truth)

    def _features(self, net: nn.Module, images: list[Image.Image], half: bool) -> Tensor:
        found = []
        for start in range(0, len(images), 500):
            x = torch.stack([self.whole(image) for image in images[start : start + 500]])
            x = x.to(self.device, memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, half):
                found.append(F.normalize(net(x).float(), dim=1).cpu())
        return torch.cat(found)


def encoder(splits: int) -> nn.Module:
    net = resnet18(num_classes=DIM, norm_layer=partial(SplitBatchNorm, splits=splits))
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()  # type: ignore[assignment]
    return net


class PlainStep:
    """Step of the demo: from images of queries and keys to the loss."""

    def __init__(self, net: nn.Module, queue: Tensor, args: argparse.Namespace) -> None:
        """queue: unit columns [DIM, QUEUE]."""
        self.query, self.queue, self.place = net, queue, 0
        self.key = copy.deepcopy(net).requires_grad_(False)
        self.optimizer = torch.optim.SGD(
            net.parameters(), 0.0, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        half = args.precision == "bf16"
        self.autocast = partial(torch.autocast, queue.device.type, torch.bfloat16, half)

    def __call__(self, ours: Tensor, theirs: Tensor, shuffle: Tensor, lr: float) -> float:
        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                key.mul_(MOMENTUM).add_(query, alpha=1 - MOMENTUM)
            with self.autocast():
                k = F.normalize(self.key(theirs[shuffle]).float(), dim=1)
            k = k[shuffle.argsort()]
        with self.autocast():
            q = F.normalize(self.query(ours).float(), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue], dim=1) / TEMPERATURE
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.queue[:, self.place : self.place + len(k)] = k.T
        self.place = (self.place + len(k)) % QUEUE
        return loss.item()


class PackageStep:
    """The same by the package's parts."""

    def __init__(self, net: nn.Module, queue: Tensor, args: argparse.Namespace) -> None:
        from moco_scale.engines.base import EngineSettings
        from moco_scale.engines.ddp import DDPEngine
        from moco_scale.methods.key_queue import KeyQueue
        from moco_scale.methods.moco import MoCo
        from moco_scale.models.batchnorm import set_groups
        from moco_scale.models.encoder import build_encoder

        query = build_encoder("resnet18", stem="cifar", dim=DIM, seed=args.seed)
        expected = net.state_dict()
        for name, value in query.state_dict().items():
            theirs = expected[name.removeprefix("backbone.").replace("head.", "fc.")]
            if not torch.equal(value, theirs.cpu()):
                raise AssertionError(f"{name} does not begin where the plain network's does")
        device = queue.device
        moco = MoCo(query).to(device)
        self.query = moco.query
        set_groups(moco, args.batch_size // args.bn_splits, args.batch_size)
        settings = EngineSettings(SGD_MOMENTUM, WEIGHT_DECAY, precision=args.precision)
        self.engine = DDPEngine(moco, settings, device)
        self.queue = KeyQueue(QUEUE, DIM, args.seed, device)
        self.queue.keys.copy_(queue.T)

    def __call__(self, ours: Tensor, theirs: Tensor, shuffle: Tensor, lr: float) -> float:
        (query,) = self.engine.query(ours, micro_batch=0)
        keys = self.engine.key(theirs[shuffle])[shuffle.argsort()]
        images = np.arange(len(keys))  # which nothing is asked about
        loss = self.queue.contrast(query, keys, TEMPERATURE, images).loss.mean()
        self.engine.backward(loss)
        if not self.engine.step(lr):
            raise AssertionError("a step was left out")
        self.engine.ema(MOMENTUM)
        self.queue.enqueue(keys)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("images", type=Path, help="a folder of train/CLASS/* and val/CLASS/*")
    parser.add_argument("--step", choices=("plain", "package"), default="plain")
    parser.add_argument("--per-class", type=int, default=1000, help="images (1000)")
    parser.add_argument("--epochs", type=int, default=8, help="so many are run (8)")
    parser.add_argument("--of", type=int, default=8, help="epochs of the cosine (8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bn-splits", type=int, default=8, help="parts of a batch (8)")
    parser.add_argument("--lr", type=float, default=0.015)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--knn", action="store_true", help="a kNN after each epoch")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for split in ("train", "val") if args.knn else ("train",):
        if not (args.images / split).is_dir():
            parser.error(f"{args.images} has no folder {split}/ of CLASS/*")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = encoder(args.bn_splits).to(device).to(memory_format=torch.channels_last)
    queue = F.normalize(torch.randn(DIM, QUEUE, device=device), dim=0)
    kind = PlainStep if args.step == "plain" else PackageStep
    step = kind(net, queue, args)
    data = Pairs(images_of(args.images / "train", args.per_class)[0])
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    neighbours = Neighbours(args.images, args.per_class, device) if args.knn else None
    losses, knn, start = list[float](), list[float](), time.monotonic()

    def measured() -> str:
        if neighbours is None:
            return ""
        knn.append(neighbours.top1(step.query, args.precision == "bf16"))
        return f", kNN {knn[-1]:.2f} %"

    print(f"before training{measured()}", flush=True)
    for epoch in range(1, args.epochs + 1):
        lr = args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.of))
        found = []
        for pair in loader:
            ours, theirs = (x.to(device, memory_format=torch.channels_last) for x in pair)
            shuffle = torch.randperm(len(theirs), device=device)
            found.append(step(ours, theirs, shuffle, lr))
        losses.append(sum(found) / len(found))
        print(f"epoch {epoch}: mean loss {losses[-1]:.4f}, lr {lr:.5f}{measured()}", flush=True)
    result = {
        "losses": [round(loss, 4) for loss in losses],
        "knn": [round(top1, 2) for top1 in knn],
        "step": args.step,
        "seed": args.seed,
        "seconds": round(time.monotonic() - start, 1),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
