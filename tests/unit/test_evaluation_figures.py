"""The curves and the sheet of neighbours: what is drawn, not how it looks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from moco_scale.__main__ import main
from moco_scale.evaluation import curves, figures
from moco_scale.evaluation.knn import open_splits
from moco_scale.utils.errors import UserError

Records = list[dict[str, Any]]


def records(steps: int, per_epoch: int = 4) -> Records:
    lines: Records = []
    for step in range(1, steps + 1):
        done = step % per_epoch == 0
        record = {
            "step": step,
            "epoch": (step - 1) // per_epoch + done,
            "loss": 8.0 - step / 100,
            "chance_loss": math.log(4097),
            "lr": 0.03,
            "images_per_second": 100.0,
            "data_wait_fraction": 0.1,
        }
        if done:
            record |= {"epoch_loss": 8.0, "knn_top1": 30.0 + step}
        lines.append(record)
    return lines


def drawn(
    lines: Records, folder: Path, monkeypatch: pytest.MonkeyPatch, tail: str = "", **options: Any
) -> dict[str, Axes]:
    """Write the report; the axes it drew, by the first word of their title."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **keywords: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **keywords)

    monkeypatch.setattr(Figure, "savefig", keep)
    metrics, out = folder / "metrics.jsonl", folder / "report.png"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    figures.report(metrics, out, **options)
    with Image.open(out) as image:
        image.verify()
    return {a.get_title(loc="left").split(" ")[0]: a for a in drawn[-1].axes}


def points(axis: Axes, line: int = -1) -> list[tuple[float, float]]:
    xy: np.ndarray = np.asarray(axis.get_lines()[line].get_xydata())
    return [(float(x), float(y)) for x, y in xy]


def test_curves_are_over_epochs_with_the_initial_knn_at_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = records(8)
    lines[0]["knn_top1_initial"] = 25.0
    axes = drawn(lines, tmp_path, monkeypatch)
    assert points(axes["kNN"]) == [(0.0, 25.0), (1.0, 34.0), (2.0, 38.0)]
    assert axes["kNN"].get_xlabel() == "epoch"
    assert points(axes["contrastive"], 0)[3] == (1.0, pytest.approx(7.96))
    assert points(axes["contrastive"])[0][1] == pytest.approx(math.log(4097)), "no chance level"
    assert "chance level 8.32" in axes["contrastive"].get_title(loc="left")
    assert not axes["contrastive"].texts, "text that may hide the curve"
    assert len(points(axes["learning"])) == 8


def test_a_resumed_step_counts_once_and_rubbish_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = records(6)
    lines += [{"step": 5, "loss": 1.25}, {"step": 7, "loss": math.nan}, {"loss": 3.0}]
    axes = drawn(lines, tmp_path, monkeypatch, tail='{"step": 8, "lo', chance_loss=9.0)
    losses = [y for _, y in points(axes["contrastive"], 0)]
    assert losses == pytest.approx([7.99, 7.98, 7.97, 7.96, 1.25, 7.94])
    assert points(axes["contrastive"])[0][1] == 9.0


@pytest.mark.parametrize("lines", [[], records(1), [{"step": 1}], records(200, 10)])
def test_any_length_is_drawn(
    lines: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = drawn(lines, tmp_path, monkeypatch, title="a run")
    if len(lines) == 1 and "loss" in lines[0]:
        assert points(axes["contrastive"], 0) == [(1.0, 7.99)]
        assert axes["contrastive"].get_lines()[0].get_marker() == "o", "a lone point needs a dot"


def test_missing_metrics_and_unwritable_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*absent\.jsonl"):
        figures.report(tmp_path / "absent.jsonl", tmp_path / "report.png")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    with pytest.raises(UserError, match="cannot write"):
        figures.report(metrics, tmp_path / "no-such-folder" / "report.png")


def test_records_that_others_wrote_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd: Any = [
        *({"step": s} for s in ("8", -1, 2**60, 1.5, None, [9])),
        *({"step": 6, "epoch": e} for e in ("x", -1, None)),
        {"step": 7, "loss": "x", "lr": 10**400, "knn_top1": [1], "chance_loss": "y"},
        *(17, [], "text", {}),
    ]
    tail = "\xff\u2028\n" + "[" * 5000 + "\n" + "x" * 3_000_000
    axes = drawn([*records(6), *odd], tmp_path, monkeypatch, tail=tail)
    assert len(points(axes["contrastive"], 0)) == 6


def test_names_of_classes_are_neither_formulas_nor_codes(tmp_path: Path) -> None:
    gray = torch.full((2, 1, 3, 8, 8), 128, dtype=torch.uint8)
    classes = ["$\\frac{$", "\x1b[2J\udce9" + "a" * 20_000]
    for title in classes:
        figures.neighbours(
            gray[:, 0], [0, 1], [("x", gray, [[0], [1]])], tmp_path / "n.png", classes=classes,
            title=title,
        )  # fmt: skip


def test_smoothing_is_a_centred_mean_that_keeps_the_ends() -> None:
    assert curves._smoothed([1.0, 2.0, 6.0, 2.0], 3) == pytest.approx([1.5, 3.0, 10 / 3, 4.0])


def test_nearest_is_by_angle_nearest_first() -> None:
    bank = torch.tensor([[10.0, 0.0], [1.0, 1.0], [0.0, 0.1], [-1.0, 0.0]])
    queries = torch.tensor([[2.0, 0.1], [0.0, 5.0]])
    assert figures.nearest(bank, queries, 3).tolist() == [[0, 1, 2], [2, 1, 0]]
    assert figures.nearest(bank, queries, 9).shape == (2, 4)


def test_queries_show_each_class_before_any_twice() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 2, dtype=np.int32)
    chosen = figures._varied(labels, 4, seed=0)
    assert len(set(chosen.tolist())) == 4
    assert set(labels[chosen[:]].tolist()) == {0, 1, 2}
    assert figures._varied(labels, 4, seed=0).tolist() == chosen.tolist()
    assert figures._varied(labels, 4, seed=1).tolist() != chosen.tolist()


RIGHT, WRONG = (0x2E, 0x9E, 0x4F), (0xD1, 0x45, 0x3B)


@pytest.mark.parametrize(
    ("truth", "neighbour", "frames"),
    [(0, 0, {RIGHT}), (0, 1, {WRONG}), (-1, -1, set())],
)
def test_frames(truth: int, neighbour: int, frames: set[Any], tmp_path: Path) -> None:
    out = tmp_path / "n.png"
    gray = torch.full((1, 2, 3, 8, 8), 128, dtype=torch.uint8)
    figures.neighbours(gray[:, 0], [truth], [("before", gray, [[neighbour] * 2])], out)
    # The legend shows both colours, but only the frames are broad enough for their pure colour
    # to be in every corner; count pixels instead of guessing.
    with Image.open(out) as image:
        pixels = np.array(image.convert("RGB")).reshape(-1, 3)
    broad = {c for c in (RIGHT, WRONG) if (pixels == c).all(1).sum() > 500}
    assert broad == frames


def by_colour(x: Tensor) -> Tensor:
    """Mean colour: a feature with which look-alikes are near."""
    return x.mean((2, 3))


def test_sheet_from_shards(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "shards"
    assert main(["shard", "--source", str(image_folder), "--out", str(data)]) == 0
    calls: list[dict[str, Any]] = []
    real = figures.neighbours

    def keep(query: Tensor, labels: Any, columns: Any, out: Any, **keywords: Any) -> None:
        calls.append({"query": query, "labels": labels, "columns": columns, **keywords})
        real(query, labels, columns, out, **keywords)

    monkeypatch.setattr(figures, "neighbours", keep)
    sheet: Callable[..., None] = figures.neighbours_sheet
    out = tmp_path / "neighbours.png"
    sheet(
        by_colour,
        lambda x: -by_colour(x),  # another encoder with the same angles
        open_splits(data),
        out,
        image_size=16,
        resize_ratio=1.0,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        queries=3,
        columns=4,
        max_bank=20,
        num_workers=0,
    )
    assert out.stat().st_size > 1000
    (call,) = calls
    assert call["labels"] == [0, 1, 2] and call["classes"] == ["ash", "birch", "cedar"]
    (_, before, before_labels), (_, after, _) = call["columns"]
    assert before.shape == (3, 4, 3, 16, 16) and torch.equal(before, after)
    assert all(0 <= label < 3 for row in before_labels for label in row)
    query = by_colour(call["query"].float() / 255 * 4 - 2)
    shown = by_colour(before[:, 0].float() / 255 * 4 - 2)
    last = by_colour(before[:, 3].float() / 255 * 4 - 2)
    cosine = torch.nn.functional.cosine_similarity
    assert (cosine(query, shown) >= cosine(query, last)).all(), "nearest first"
