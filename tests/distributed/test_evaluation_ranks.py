"""Evaluations on several ranks give what one process gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from torch import nn

from moco_scale.__main__ import main
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.evaluation.features import Pixels, extract
from moco_scale.evaluation.figures import neighbours_sheet
from moco_scale.evaluation.knn import KnnMonitor, open_splits
from moco_scale.evaluation.linear import LinearConfig, LinearEvaluation
from moco_scale.evaluation.pretrained import Pretrained
from moco_scale.models.encoder import Encoder

PIXELS = Pixels(8, 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def tiny_encoder() -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return Encoder(nn.Sequential(*layers), nn.Linear(6, 4), 6)


def evaluate(data: Path, out: Path) -> dict[str, Any]:
    """Every kind of evaluation; on each rank, in a process group."""
    train, val = (IndexedShards.open(data, split) for split in ("train", "val"))
    encoder = tiny_encoder()
    features, labels = extract(encoder, train, **vars(PIXELS), batch_size=5, num_workers=0)
    few, _ = extract(encoder, val.subset(np.arange(2)), **vars(PIXELS), num_workers=0)
    # k is more than a rank's share of the bank.
    monitor = KnnMonitor(train, val, **vars(PIXELS), k=15, num_workers=0)
    results = {
        "features": features,
        "labels": labels,
        "fewer images than ranks": few,
        "knn": monitor.measure(encoder, "features"),
    }
    out.mkdir(exist_ok=True)
    for cache in (False, True):
        config = LinearConfig(epochs=2, batch_size=6, learning_rate=0.5, cache_features=cache)
        config = dataclasses.replace(config, schedule="bl0" if cache else "official")
        pretrained = Pretrained(encoder, {"dim": 4}, Path("current.pth"), 1, 1, "tiny")
        run = LinearEvaluation(pretrained, train, val, PIXELS, config, out, num_workers=0)
        result = run.run()
        history = [[e["train_loss"], e["train_top1"], e["top1"]] for e in result["history"]]
        results[config.variant] = torch.tensor(history)
        results[config.variant + " weights"] = run.classifier.weight.detach().clone()
    neighbours_sheet(
        encoder,
        encoder.features,
        open_splits(data),
        out / "n.png",
        **vars(PIXELS),
        queries=2,
        num_workers=0,
    )
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Shards of 22 and 11 images, and what one process makes of them."""
    from conftest import write_image

    folder = tmp_path_factory.mktemp("evaluation")
    for i in range(33):
        split = "train" if i < 22 else "val"
        write_image(folder / "images" / split / "abc"[i % 3] / f"{i}.jpg", seed=i)
    data = folder / "shards"
    assert main(["shard", "--source", str(folder / "images"), "--out", str(data)]) == 0
    return data, run_ranks(evaluate, 1, data, folder / "alone")[0]


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks(
    world: int, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    data, expected = alone
    per_rank = run_ranks(evaluate, world, data, tmp_path / "out")
    for results in per_rank:
        assert results.keys() == expected.keys()
        assert results["knn"] == expected["knn"]
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(results[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert (tmp_path / "out" / "n.png").stat().st_size > 1000


def test_the_case_tells_something(alone: tuple[Path, dict[str, Any]]) -> None:
    _, expected = alone
    assert 0 < expected["knn"]["top1"] < 100
    assert expected["labels"].unique().tolist() == [0, 1, 2]
    assert expected["features"].std(0).min() > 1e-4
