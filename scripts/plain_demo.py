"""The CIFAR-10 demo of MoCo written out in plain torch, for the losses of its epochs.

    python scripts/plain_demo.py PICTURES [--per-class N] [--epochs N] [--of N] [--seed N] …

What a run of this package is compared with where no figures are published: one process,
torchvision's network and transforms on PIL images, torch's DataLoader, nn.BatchNorm2d applied to
parts of the batch, the queue as one matrix, cross-entropy over concatenated logits. Nothing of the
package is imported. Two seeds show how much such a run differs from itself.

PICTURES is a folder of train/CLASS/*; the first --per-class files of each class, by name, are the
training set. --epochs of a cosine over --of epochs are run.

Prints a line an epoch and, as its last line, one JSON object: ``losses``, the mean of each epoch,
and ``seed``, ``seconds``, ``torch``, ``torchvision``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet18

DIM, QUEUE, MOMENTUM, TEMPERATURE = 128, 4096, 0.99, 0.1
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each picture."""

    def __init__(self, folder: Path, per_class: int) -> None:
        classes = sorted(path for path in (folder / "train").iterdir() if path.is_dir())
        files = [path for of in classes for path in sorted(of.iterdir())[:per_class]]
        self.pictures = [Image.open(path).convert("RGB") for path in files]
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
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.view(self.pictures[i]), self.view(self.pictures[i])


class SplitBatchNorm(nn.BatchNorm2d):
    """Normalises so many equal parts of a batch on their own."""

    def __init__(self, features: int, splits: int) -> None:
        super().__init__(features)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(SplitBatchNorm, self).forward(p) for p in x.chunk(self.splits)])


def encoder(splits: int) -> nn.Module:
    net = resnet18(num_classes=DIM, norm_layer=partial(SplitBatchNorm, splits=splits))
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()  # type: ignore[assignment]
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pictures", type=Path, help="a folder of train/CLASS/*")
    parser.add_argument("--per-class", type=int, default=1000, help="pictures (1000)")
    parser.add_argument("--epochs", type=int, default=8, help="so many are run (8)")
    parser.add_argument("--of", type=int, default=8, help="epochs of the cosine (8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bn-splits", type=int, default=8, help="parts of a batch (8)")
    parser.add_argument("--lr", type=float, default=0.015)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    query_net = encoder(args.bn_splits).to(device).to(memory_format=torch.channels_last)
    key_net = copy.deepcopy(query_net).requires_grad_(False)
    queue = F.normalize(torch.randn(DIM, QUEUE, device=device), dim=0)
    optimizer = torch.optim.SGD(query_net.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, args.precision == "bf16")
    data = Pairs(args.pictures, args.per_class)
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    losses, place, start = list[float](), 0, time.monotonic()
    for epoch in range(1, args.epochs + 1):
        lr = args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.of))
        optimizer.param_groups[0]["lr"] = lr
        found = []
        for ours, theirs in loader:
            ours = ours.to(device, memory_format=torch.channels_last)
            theirs = theirs.to(device, memory_format=torch.channels_last)
            with torch.no_grad():
                for key, query in zip(key_net.parameters(), query_net.parameters(), strict=True):
                    key.mul_(MOMENTUM).add_(query, alpha=1 - MOMENTUM)
                shuffled = torch.randperm(len(theirs), device=device)
                with autocast():
                    k = F.normalize(key_net(theirs[shuffled]).float(), dim=1)
                k = k[shuffled.argsort()]
            with autocast():
                q = F.normalize(query_net(ours).float(), dim=1)
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], dim=1) / TEMPERATURE
            loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            queue[:, place : place + len(k)] = k.T
            place = (place + len(k)) % QUEUE
            found.append(loss.item())
        losses.append(sum(found) / len(found))
        print(f"epoch {epoch}: mean loss {losses[-1]:.4f}, lr {lr:.5f}", flush=True)
    result = {
        "losses": [round(loss, 4) for loss in losses],
        "seed": args.seed,
        "seconds": round(time.monotonic() - start, 1),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
