"""The CIFAR-10 recipe for as many epochs as fit: ``python scripts/gpu_check/cifar10.py [--tiny]``.

    python scripts/gpu_check/cifar10.py [--source FILE] [--minutes 8] [--precision bf16]

``--source`` is what ``make cifar10`` takes; without it, rendered images of 32 pixels stand in,
whose kNN says nothing about CIFAR-10. A few dozen steps tell how long an epoch takes; the run then
has as many epochs as the budget allows, so that its schedule ends with it. The last line is one
JSON object: ``epochs``, ``images_per_second``, ``loss`` of the last epoch, ``knn_top1`` in percent,
``knn_top1_initial``, ``minutes`` of the run, ``images``, ``source``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moco_scale.commands.cifar10 import prepare
from moco_scale.data.open import open_shards
from moco_scale.demo.render import CLASSES, write_folder

ROOT = Path(__file__).resolve().parents[2]
BATCH = 512


def command(*words: object) -> None:
    line = [sys.executable, *(str(word) for word in words)]
    print("$ " + " ".join(line), flush=True)
    subprocess.run(line, cwd=ROOT, check=True)


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def images_of(args: argparse.Namespace, folder: Path) -> Path:
    if args.source is not None:
        return prepare(args.source, folder, folder)
    count = 12 if args.tiny else 5000
    write_folder(folder / "images", train_per_class=count, val_per_class=count // 5, size=32)
    return folder / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", type=Path, help="CIFAR-10: an archive, a folder or a tar")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the run itself")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=8, help="decoding processes")
    parser.add_argument("--tiny", action="store_true", help="120 images, 2 epochs, fp32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = folder / "shards"
        source = images_of(args, folder)
        command("-m", "moco_scale", "shard", "--source", source, "--out", shards)
        count = len(open_shards(str(shards), "train"))
        batch = 16 if args.tiny else BATCH
        per_epoch = count // batch
        flags: list[object] = ["train.py", "--recipe", "cifar10", "--data-dir", shards]
        flags += ["--device", args.device, "--batch-size", batch]
        if args.tiny:
            flags += ["--num-workers", 0, "--nce-k", 64, "--precision", "fp32", "--image-size", 16]
        else:
            flags += ["--num-workers", args.workers, "--precision", args.precision]
        # The first steps also warm up; the last report of several is what a step takes.
        few = min(3 * per_epoch, 4 if args.tiny else 200)
        trial = [*flags, "--output-dir", folder / "trial", "--print-freq", max(1, few // 4)]
        command(*trial, "--epochs", 4, "--max-steps", few, "--knn-freq", 0)
        rate = logged(folder / "trial")[-1]["images_per_second"]
        seconds = per_epoch * batch / rate
        epochs = 2 if args.tiny else max(1, int(args.minutes * 60 / (1.1 * seconds)))
        print(f"{rate:.0f} images/s, {seconds:.1f} s an epoch: {epochs} epochs", flush=True)
        out, started = folder / "run", time.monotonic()
        command(
            *(*flags, "--output-dir", out, "--epochs", epochs, "--knn-freq", max(1, epochs // 4)),
            *("--print-freq", max(1, per_epoch), "--save-freq", 0),
        )
        minutes = (time.monotonic() - started) / 60
        records = logged(out)
        last = records[-1]
        rates = sorted(record["images_per_second"] for record in records)
        result = {
            "epochs": epochs,
            "images_per_second": round(rates[len(rates) // 2], 1),
            "loss": round(last["epoch_loss"], 4),
            "knn_top1": round(last["knn_top1"], 2),
            "knn_top1_initial": next(
                r["knn_top1_initial"] for r in records if "knn_top1_initial" in r
            ),
            "minutes": round(minutes, 2),
            "images": count,
            "source": "CIFAR-10" if args.source else f"rendered, {len(CLASSES)} classes",
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
