"""What a run says of itself before its first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moco_scale.config.command_line import parse
from moco_scale.config.recipes import RECIPES
from moco_scale.distributed import collectives
from moco_scale.models.batchnorm import GroupedBatchNorm2d
from moco_scale.training import banner as module
from moco_scale.training.banner import cautions, run_summary, title


def said(
    monkeypatch: pytest.MonkeyPatch, line: str, *, images: int = 1_281_167, world: int = 1
) -> str:
    """The summary of a run with these flags."""
    monkeypatch.setattr(collectives, "world_size", lambda: world)
    monkeypatch.setattr(module, "epoch_notes", lambda *_: [])
    run: Any = SimpleNamespace(
        config=parse(line.split()),
        shards=range(images),
        device=torch.device("cpu"),
        plan=SimpleNamespace(steps_per_epoch=7, order=None),
        engine=SimpleNamespace(notes=[], moco=nn.Sequential(GroupedBatchNorm2d(2))),
        resumed_from=None,
        step=0,
    )
    return "\n".join([*run_summary(run, 0), *(f"warning: {text}" for text in cautions(run))])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_published_run_says_what_it_is_to_reach(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(["--recipe", recipe])
    assert config.preset.images is not None
    text = said(monkeypatch, f"--recipe {recipe} --rng-seed 3", images=config.preset.images)
    assert RECIPES[recipe].published in text
    assert "--rng-seed 3 (0)" in text and "->" not in text and "warning" not in text
    assert title(config, config.preset.images).endswith(f"recipe {recipe}")


@pytest.mark.parametrize(
    ("line", "images"),
    [
        ("--recipe v2 --epochs 100", 1_281_167),
        ("--recipe v2 --symmetric", 1_281_167),
        ("--recipe v2 --model resnet18", 1_281_167),
        ("--recipe v2 --dataset images", 1_281_167),
        ("--recipe v2", 500),
        ("--recipe cifar10", 10_000),
    ],
)
def test_another_run_does_not_promise_the_published_figure(
    line: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "published" not in said(monkeypatch, line, images=images)
    assert title(parse(line.split()), images).endswith("with other settings")


@pytest.mark.parametrize(
    "line", ["v2 --epochs 800", "v1-b1024 --nce-k 16384", "cifar10 --epochs 400 --symmetric"]
)
def test_variants_that_are_published_too(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = 50_000 if line.startswith("cifar10") else 1_281_167
    assert "published" in said(monkeypatch, f"--recipe {line}", images=images)


def test_what_is_not_the_recipes_is_listed_and_what_followed_from_it_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = said(monkeypatch, "--batch-size 20 --epochs 3 --lr-decay-epochs 1 2 --symmetric")
    for words in ("--batch-size 20 (1024)", "--epochs 3 (200)", "--symmetric yes (no)"):
        assert words in text
    assert "--lr-decay-epochs 1,2 (120,160)" in text
    assert "BatchNorm group 128 -> 20: the recipe's does not divide the batch of 20" in text
    assert "warm-up 5 -> 0: the recipe's leaves nothing of 3 epochs" in text
    assert "--bn-group-size" not in text.partition("->")[0] and "--warmup-epoch" not in text
    assert "--bn-group-size 64 (128)" in said(monkeypatch, "--bn-group-size 64")


def test_what_was_given_by_hand_is_not_said_to_have_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = "--batch-size 24 --bn-group-size 8 --epochs 3 --warmup-epoch 1"
    text = said(monkeypatch, flags)
    assert "->" not in text
    for words in ("--bn-group-size 8 (128)", "--warmup-epoch 1 (5)", "--batch-size 24 (1024)"):
        assert words in text


def test_what_nobody_gave_is_not_listed_as_a_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"gradient_clipping": 0.5}')
    text = said(monkeypatch, f"--data-dir https://host/d --deepspeed {file}")
    assert "--shuffle-window" not in text and "--clip-grad" not in text
    assert "shuffle window 0 -> 64: the images are remote" in text
    assert f"gradient clipping 0 -> 0.5: set in {file}" in text
    given = said(monkeypatch, "--data-dir https://host/d --shuffle-window 8 --clip-grad 1")
    assert "--shuffle-window 8 (0)" in given and "--clip-grad 1 (0)" in given


def test_a_queue_that_holds_each_image_often_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(monkeypatch, "--dataset images", images=3002)
    (warning,) = (line for line in text.splitlines() if "queue" in line)
    assert "65,536 keys hold each of the 3,002 images about 22 times" in warning
    assert "--nce-k 1024" in warning and warning.startswith("warning: ")
    for flags in ("--dataset images --nce-k 3002", "--dataset images --mask-same-image"):
        assert "the queue's" not in said(monkeypatch, flags, images=3002)


def test_a_precision_that_the_cpu_emulates_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, there in (("fp16", False), ("bf16", True)):
        name = f"_is_mkldnn_{precision}_supported"
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda there=there: there, raising=False)
    text = said(monkeypatch, "--precision fp16")
    assert "does not compute in fp16 (avx512_fp16" in text and "--precision bf16 or fp32" in text
    assert "does not compute" not in said(monkeypatch, "--precision fp32")


def test_shares_of_the_batch_and_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(monkeypatch, "--recipe v2", world=8)
    assert "global batch 256, 32 a process, BatchNorm groups of 32;" in text
    text = said(monkeypatch, "--recipe v2", world=32)
    assert "global batch 256, 8 a process, BatchNorm groups of 32, each over 4 processes" in text


def test_shuffling_inside_one_group_is_said_to_be_void(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--recipe v2 --batch-size 32"
    text = said(monkeypatch, flags)
    assert "--shuffle-bn world changes no statistics" in text
    # The group was not the user's choice, and the remedy is a number that works.
    assert "the default without --bn-group-size" in text and "--bn-group-size 16 makes 2" in text
    assert "as nobody" not in said(monkeypatch, f"{flags} --bn-group-size global")
    assert "changes no" not in said(monkeypatch, f"{flags} --shuffle-bn off")
    assert "changes no" not in said(monkeypatch, f"{flags} --bn-group-size 16")
