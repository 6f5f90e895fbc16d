"""Real ImageNet images through the three commands: shard, train, evaluate."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from commands import BIN
from conftest import REPOSITORY
from harness import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

# What the DeepSpeed launcher says on a machine with neither GPU nor hostfile, and why: the first
# is about the missing GPU, the second about there being one node.
EXPECTED = ("Setting accelerator to CPU", "Unable to find hostfile")


def run(*arguments: object) -> str:
    """Run a command to its end; returns what it wrote, which holds no unexpected warning."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if re.search("warn|error", line, re.I)]
    assert not [line for line in lines if not any(text in line for text in EXPECTED)], done.stdout
    return done.stdout


def test_shard_train_evaluate(shared_data: Path, tmp_path: Path) -> None:
    images, shards, out = (tmp_path / name for name in ("imagenet-sample", "shards", "run"))
    with tarfile.open(shared_data / "imagenet-sample.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    # The sample has no validation images. Those of the first classes serve as such here.
    for folder in sorted((images / "train").iterdir())[:20]:
        (images / "val" / folder.name).mkdir(parents=True)
        for image in folder.iterdir():
            os.link(image, images / "val" / folder.name / image.name)

    module = (sys.executable, "-m", "moco_scale")
    text = run(*module, "shard", "--source", images, "--out", shards, "--verify")
    assert "500 train images" in text

    launcher = (BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port())
    shape = ("--batch-size", 16, "--bn-group-size", 8, "--max-steps", 3, "--print-freq", 1)
    run(
        *(*launcher, "train.py", "--deepspeed", "ds_configs/zero1.json", "--recipe", "v2", *shape),
        *("--data-dir", shards, "--output-dir", out, "--knn-freq", 0, "--num-workers", 1),
    )
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]

    for protocol, more in (
        ("knn", ()),
        ("linear", ("--cache-features", "--epochs", 2)),
    ):
        run(
            *(*launcher, "eval.py", "--protocol", protocol, *more, "--num-workers", 1),
            *("--data-dir", shards, "--pretrained-model", out / "current.pth"),
            *("--output-dir", tmp_path / protocol),
        )
        result = json.loads((tmp_path / protocol / "results.json").read_text())
        assert 0 <= result["top1"] <= result["top5"] <= 100
    # Each validation image lies in the bank with its label and outvotes those that do not.
    knn = json.loads((tmp_path / "knn" / "results.json").read_text())
    assert knn["top1"] > 50
