"""What a run says of itself before its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moco_scale import announcement as module
from moco_scale import distributed
from moco_scale.announcement import announcement, title
from moco_scale.batchnorm import GroupedBatchNorm2d
from moco_scale.command_line import parse
from moco_scale.recipes import RECIPES


def said(
    monkeypatch: pytest.MonkeyPatch, line: str, *, pictures: int = 1_281_167, world: int = 1
) -> str:
    """The announcement of a run with these flags."""
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(module, "epoch_notes", lambda *_: [])
    run: Any = SimpleNamespace(
        config=parse(line.split()),
        shards=range(pictures),
        device=torch.device("cpu"),
        plan=SimpleNamespace(steps_per_epoch=7, order=None),
        engine=SimpleNamespace(notes=[], moco=nn.Sequential(GroupedBatchNorm2d(2))),
        resumed_from=None,
        step=0,
    )
    return "\n".join(announcement(run, 0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_published_run_says_what_it_is_to_reach(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(["--recipe", recipe])
    assert config.preset.images is not None
    text = said(monkeypatch, f"--recipe {recipe} --rng-seed 3", pictures=config.preset.images)
    assert RECIPES[recipe].published in text
    assert "--rng-seed 3 (0)" in text and "->" not in text and "warning" not in text
    assert title(config, config.preset.images).endswith(f"recipe {recipe}")


@pytest.mark.parametrize(
    ("line", "pictures"),
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
    line: str, pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "published" not in said(monkeypatch, line, pictures=pictures)
    assert title(parse(line.split()), pictures).endswith("with other settings")


@pytest.mark.parametrize(
    "line", ["v2 --epochs 800", "v1-b1024 --nce-k 16384", "cifar10 --epochs 400 --symmetric"]
)
def test_variants_that_are_published_too(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = 50_000 if line.startswith("cifar10") else 1_281_167
    assert "published" in said(monkeypatch, f"--recipe {line}", pictures=pictures)


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


def test_shares_of_the_batch_and_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(monkeypatch, "--recipe v2", world=8)
    assert "global batch 256, 32 a process, BatchNorm groups of 32;" in text
    text = said(monkeypatch, "--recipe v2", world=32)
    assert "global batch 256, 8 a process, BatchNorm groups of 32, each over 4 processes" in text


def test_shuffling_inside_one_group_is_said_to_be_void(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--recipe v2 --batch-size 32"
    assert "--shuffle-bn world changes no statistics" in said(monkeypatch, flags)
    assert "changes no" not in said(monkeypatch, f"{flags} --shuffle-bn off")
    assert "changes no" not in said(monkeypatch, f"{flags} --bn-group-size 16")
