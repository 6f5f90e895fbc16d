"""MoCo v2 on CIFAR-10 in one file of plain PyTorch: algorithm 1 of the paper and what it needs.

    python examples/moco_in_one_file.py IMAGES                    # 200 epochs: for a GPU
    python examples/moco_in_one_file.py IMAGES --per-class 1000 --epochs 8 --batch-size 128

IMAGES is a folder or a tar of train/CLASS/* and val/CLASS/*, or the folder that holds what
torchvision downloads of CIFAR-10. With ``--head linear`` this is the official CIFAR-10 demo, whose
authors report a kNN accuracy of 82.6 % after 200 epochs.

One process, torchvision's network and transforms, one matrix for the queue, cross entropy over
concatenated logits. Nothing of moco_scale is imported: its tests compare it with these classes.
The loss begins low, because the queue begins with random vectors, rises while keys take their
place, and falls from there.

He et al. 2020, Momentum Contrast for Unsupervised Visual Representation Learning; Chen et al. 2020,
Improved Baselines with Momentum Contrastive Learning.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18

# Those of the official demo: CIFAR-10 is small, and so is its queue, whose keys must age faster.
DIM, QUEUE, TEMPERATURE, KEY_MOMENTUM = 128, 4096, 0.1, 0.99
SGD_MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
NEIGHBOURS, KNN_TEMPERATURE = 200, 0.1
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


# The method: algorithm 1, ShuffleBN (section 3.3), and the encoder.


class MoCo:
    """Query encoder, key encoder, queue, and the step that trains them.

    Args:
        query: trained by SGD; the key encoder begins as its copy and has no gradient.
        queue: keys of earlier batches, unit rows [K, dim]; random ones to begin with.
        temperature: T of the softmax.
        key_momentum: m of the key encoder's moving average.
        sgd_momentum: of the optimizer.
        weight_decay: of the optimizer.
        precision: "fp32", or "bf16": what the encoders compute in; everything else is fp32.
    """

    def __init__(
        self,
        query: nn.Module,
        queue: Tensor,
        *,
        temperature: float = TEMPERATURE,
        key_momentum: float = KEY_MOMENTUM,
        sgd_momentum: float = SGD_MOMENTUM,
        weight_decay: float = WEIGHT_DECAY,
        precision: str = "fp32",
    ) -> None:
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.queue, self.next_slot = queue, 0
        self.temperature, self.key_momentum = temperature, key_momentum
        self.precision = precision
        self.optimizer = torch.optim.SGD(
            query.parameters(), lr=0.0, momentum=sgd_momentum, weight_decay=weight_decay
        )

    def step(self, views: Sequence[Tensor], shuffles: Sequence[Tensor], lr: float) -> float:
        """Algorithm 1 on one batch; returns the loss before the update.

        Args:
            views: two of each image, [B, 3, S, S] each.
            shuffles: permutations of the batch, for ShuffleBN. One: the first view is the query,
                the second the key. Two: the symmetric loss, for which each view is both.
            lr: learning rate.
        """
        roles = [(views[0], views[1]), (views[1], views[0])][: len(shuffles)]
        queries = [encode(self.query, view, self.precision) for view, _ in roles]
        keys = [self.keys(view, p) for (_, view), p in zip(roles, shuffles, strict=True)]
        loss = torch.stack([self.loss(q, k) for q, k in zip(queries, keys, strict=True)]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.move_key_encoder()
        self.enqueue(torch.cat(keys))
        return loss.item()

    @torch.no_grad()
    def keys(self, view: Tensor, shuffle: Tensor) -> Tensor:
        """Keys of a view [B, dim], encoded in another order, so that BatchNorm leaks nothing."""
        return encode(self.key, view[shuffle], self.precision)[shuffle.argsort()]

    def loss(self, queries: Tensor, keys: Tensor) -> Tensor:
        """InfoNCE: find the own key, number 0, among the keys of the queue."""
        return F.cross_entropy(
            self.logits(queries, keys), torch.zeros(len(queries), dtype=torch.long).to(keys.device)
        )

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Similarity to the own key, then to each key of the queue, over T: [B, 1 + K]."""
        positive = (queries * keys).sum(1, keepdim=True)
        return torch.cat([positive, queries @ self.queue.T], dim=1) / self.temperature

    @torch.no_grad()
    def move_key_encoder(self) -> None:
        """Average: key <- m key + (1 - m) query; BatchNorm's running statistics are their own."""
        m = self.key_momentum
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            key.mul_(m).add_(query, alpha=1 - m)

    def enqueue(self, keys: Tensor) -> None:
        """Let keys take the place of the oldest."""
        slots = torch.arange(self.next_slot, self.next_slot + len(keys)) % len(self.queue)
        self.queue[slots.to(keys.device)] = keys
        self.next_slot = (self.next_slot + len(keys)) % len(self.queue)


def encode(encoder: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Features as fp32 unit rows [B, dim]."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = encoder(images)
    return F.normalize(features.float(), dim=1)


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm of several GPUs on one: each group of consecutive images is normalised by itself.

    Running statistics take the mean over the groups.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, group_size: int) -> None:
        super().__init__(channels)
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        outputs, means, variances = [], [], []
        for group in x.split(self.group_size):
            mean, variance = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            # With a momentum of 1 it leaves the group's own statistics in them.
            outputs.append(
                F.batch_norm(group, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            )
            means.append(mean)
            variances.append(variance)
        assert self.momentum is not None
        self.running_mean.lerp_(torch.stack(means).mean(0), self.momentum)
        self.running_var.lerp_(torch.stack(variances).mean(0), self.momentum)
        self.num_batches_tracked += 1
        return torch.cat(outputs)


def make_encoder(
    head: str, bn_group_size: int, dim: int = DIM, stem: str = "cifar"
) -> torchvision.models.ResNet:
    """torchvision's ResNet-18; its last layer is the head.

    Args:
        head: "linear" (v1) or "mlp" (v2).
        bn_group_size: images that are normalised together.
        dim: width of the output.
        stem: "cifar", a 3x3 convolution for small images, or "imagenet", torchvision's.
    """
    encoder = resnet18(
        num_classes=dim, norm_layer=partial(GroupedBatchNorm, group_size=bn_group_size)
    )
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()  # type: ignore[assignment]
    if head == "mlp":
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)  # type: ignore[assignment]
    return encoder


# The data.


def read_images(
    source: Path, split: str, per_class: int | None = None
) -> tuple[list[Image.Image], Tensor]:
    """A split's images and labels, int64; of each class the first ones by name."""
    found: dict[str, list[tuple[str, Image.Image]]] = {}
    for path, image in images_below(source, split):
        found.setdefault(path.parent.name, []).append((path.name, image))
    chosen = [
        (image, label)
        for label, name in enumerate(sorted(found))
        for _, image in sorted(found[name], key=lambda item: item[0])[:per_class]
    ]
    return [image for image, _ in chosen], torch.tensor([label for _, label in chosen])


def images_below(source: Path, split: str) -> Iterator[tuple[PurePath, Image.Image]]:
    """The images SPLIT/CLASS/* of a folder, a tar or torchvision's download, with their paths."""
    if (source / CIFAR10.base_folder).is_dir():
        data = CIFAR10(str(source), train=split == "train")
        for i, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
            yield PurePath(split, data.classes[label], f"{i:05d}"), Image.fromarray(pixels)
    elif source.is_dir():
        for path in (source / split).glob("*/*"):
            yield path, Image.open(path).convert("RGB")
    else:
        with tarfile.open(source) as tar:
            for member in tar:
                inside = PurePosixPath(member.name)
                if member.isfile() and inside.parent.parent.name == split:
                    yield inside, Image.open(tar.extractfile(member)).convert("RGB")  # type: ignore[arg-type]


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two random views of each image: v2's augmentation without blur, as in the demo."""

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


# Evaluation, training, the command line.


class Neighbours:
    """kNN (Wu et al. 2018): each val image is voted on by the train images nearest to it."""

    def __init__(self, source: Path, per_class: int | None, device: torch.device) -> None:
        self.bank, self.labels = read_images(source, "train", per_class)
        self.queries, self.truth = read_images(source, "val")
        self.device = device
        self.whole = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    @torch.no_grad()
    def top1(self, encoder: nn.Module, precision: str) -> float:
        """Top-1 in percent by an encoder's output; the encoder is left in training mode."""
        encoder.eval()
        bank = self._features(encoder, self.bank, precision)
        queries = self._features(encoder, self.queries, precision)
        encoder.train()
        right, classes = 0, int(self.labels.max()) + 1
        for query, truth in zip(queries.split(500), self.truth.split(500), strict=True):
            similarity, place = (query @ bank.T).topk(min(NEIGHBOURS, len(bank)))
            votes = torch.zeros(len(query), classes)
            votes.scatter_add_(1, self.labels[place], (similarity / KNN_TEMPERATURE).exp())
            right += int((votes.argmax(1) == truth).sum())
        return 100 * right / len(self.truth)

    def _features(self, encoder: nn.Module, images: list[Image.Image], precision: str) -> Tensor:
        found = []
        for start in range(0, len(images), 500):
            batch = torch.stack([self.whole(image) for image in images[start : start + 500]])
            batch = batch.to(self.device, memory_format=torch.channels_last)
            found.append(encode(encoder, batch, precision).cpu())
        return torch.cat(found)


class Step(Protocol):
    """What :func:`train` trains."""

    query: nn.Module

    def step(self, views: Sequence[Tensor], shuffles: Sequence[Tensor], lr: float) -> float: ...


def plain(encoder: nn.Module, queue: Tensor, args: argparse.Namespace) -> Step:
    return MoCo(encoder, queue, precision=args.precision)


def train(
    args: argparse.Namespace,
    make: Callable[[nn.Module, Tensor, argparse.Namespace], Step] = plain,
) -> dict[str, Any]:
    """Train and evaluate; prints a line an epoch.

    Every draw is from torch's one generator, in the order of the official demo: weights, queue,
    then of each batch its order, crops, colours and shuffles.
    """
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = make_encoder(args.head, args.batch_size // args.bn_splits)
    encoder = encoder.to(device).to(memory_format=torch.channels_last)
    queue = F.normalize(torch.randn(DIM, QUEUE, device=device), dim=0).T.contiguous()
    moco = make(encoder, queue, args)
    neighbours = Neighbours(args.images, args.per_class, device)
    loader = DataLoader(
        Pairs(neighbours.bank),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
    )
    losses, knn, start = list[float](), list[float](), time.monotonic()

    def measured(due: bool) -> str:
        if not due or not neighbours.queries:
            return ""
        knn.append(neighbours.top1(moco.query, args.precision))
        return f", kNN {knn[-1]:.2f} %"

    print(f"before training{measured(args.knn)}", flush=True)
    for epoch in range(1, args.epochs + 1):
        lr = args.lr * args.batch_size / 256 * 0.5 * (1 + math.cos(math.pi * epoch / args.of))
        found = []
        for pair in loader:
            views = [view.to(device, memory_format=torch.channels_last) for view in pair]
            shuffles = [
                torch.randperm(args.batch_size, device=device)
                for _ in range(2 if args.symmetric else 1)
            ]
            found.append(moco.step(views, shuffles, lr))
        losses.append(sum(found) / len(found))
        top1 = measured(args.knn or epoch == args.epochs)
        print(f"epoch {epoch}: mean loss {losses[-1]:.4f}, lr {lr:.5f}{top1}", flush=True)
    return {
        "losses": [round(loss, 4) for loss in losses],
        "knn": [round(top1, 2) for top1 in knn],
        "seed": args.seed,
        "seconds": round(time.monotonic() - start, 1),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("images", type=Path, help="a folder or a tar of train/CLASS/* and val/CLASS/*")
    add("--per-class", type=int, help="train on so many images of each class (all)")
    add("--epochs", type=int, default=200, help="(%(default)s)")
    add("--of", type=int, help="epochs of the cosine, of which --epochs are run (--epochs)")
    add("--batch-size", type=int, default=512, help="(%(default)s)")
    add("--bn-splits", type=int, default=8, help="BatchNorm groups of a batch (%(default)s)")
    add("--lr", type=float, default=0.03, help="per 256 images of the batch (%(default)s)")
    add("--head", choices=("mlp", "linear"), default="mlp", help="(%(default)s)")
    add("--symmetric", action="store_true", help="each view is query and key")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="(%(default)s)")
    add("--knn", action="store_true", help="a kNN before training and after each epoch as well")
    add("--workers", type=int, default=0, help="processes that make views (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    args.of = args.of or args.epochs
    if not args.images.exists() or next(images_below(args.images, "train"), None) is None:
        parser.error(f"{args.images} has no images train/CLASS/*")
    return args


def main() -> None:
    args = parse(make_parser((__doc__ or "").split("\n\n")[0]))
    print(json.dumps(train(args)))


if __name__ == "__main__":
    main()
