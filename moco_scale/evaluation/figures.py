"""Figures of a finished run: its curves, and nearest neighbours before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco_scale.data.loading.loader import evaluation_loader
from moco_scale.data.shards.protocols import Images
from moco_scale.distributed import consensus
from moco_scale.evaluation.curves import INK, drawn, new_figure, report, save
from moco_scale.evaluation.features import Encode, SkippedImages, extract
from moco_scale.evaluation.knn import Splits, bank_and_queries
from moco_scale.utils.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["drawn", "nearest", "neighbours", "neighbours_sheet", "report"]

_RIGHT, _WRONG = "#2e9e4f", "#d1453b"


def nearest(bank: Tensor, queries: Tensor, count: int) -> Tensor:
    """Find each query's most similar images in the bank, nearest first: int64 [Q, count]."""
    bank = F.normalize(bank.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    return (queries @ bank.T).topk(min(count, len(bank)), dim=1).indices.cpu()


def neighbours(
    query_images: Tensor,
    query_labels: Sequence[int],
    columns: Sequence[tuple[str, Tensor, Sequence[Sequence[int]]]],
    out: str | Path,
    *,
    classes: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draw queries, one a row, each with its nearest images in groups of columns.

    A neighbour has a green frame when it shares the query's label, else a red one; without labels
    (-1) there are no frames.

    Args:
        query_images: uint8 [Q, 3, S, S].
        query_labels: Q class numbers.
        columns: for each group its heading, images uint8 [Q, n, 3, S, S], labels [Q][n].
        out: PNG to write.
        classes: names of the classes, written beside the queries.
        title: above everything.

    Raises:
        UserError: The figure cannot be written.
    """
    rows, wide = len(query_images), [group.shape[1] for _, group, _ in columns]
    names = [classes[n] if 0 <= n < len(classes) else "" for n in query_labels]
    cell, name_width, top = 0.92, 0.09 * max((len(_short(n)) for n in names), default=0), 0.85
    gap = 0.3  # of a cell, between the groups
    width = name_width + cell * (1 + gap + sum(w + gap for w in wide)) + 0.2
    figure = new_figure(figsize=(width, rows * cell + top + 0.35), dpi=120)
    total_width, total_height = figure.get_size_inches()

    def place(row: int, left: float) -> Axes:
        side, bottom = 0.9 * cell, total_height - top - (row + 0.95) * cell
        box = (left + 0.05 * cell, bottom, side, side)
        inches = (total_width, total_height, total_width, total_height)
        return figure.add_axes(tuple(b / i for b, i in zip(box, inches, strict=True)))

    def heading(text: str, left: float, cells: float) -> None:
        figure.text(
            (left + cells * cell / 2) / total_width,
            1 - (top - 0.12) / total_height,
            text,
            ha="center",
            va="bottom",
            fontsize=10,
            color=INK,
        )

    start = name_width + 0.1
    if title:
        figure.text(
            start / total_width,
            1 - 0.12 / total_height,
            printable(title),
            va="top",
            fontsize=12,
            color=INK,
        )
    heading("query", start, 1)
    for row in range(rows):
        _image(place(row, start), query_images[row], None)
        y = 1 - (top + (row + 0.5) * cell) / total_height
        figure.text(
            (start - 0.08) / total_width,
            y,
            _short(names[row]),
            ha="right",
            va="center",
            fontsize=9,
            color=INK,
        )
    left = start + (1 + gap) * cell
    labelled = bool(len(query_labels)) and min(query_labels) >= 0
    for text, images, labels in columns:
        heading(text, left, images.shape[1])
        for row in range(rows):
            for i in range(images.shape[1]):
                frame = None
                if labelled:
                    frame = _RIGHT if labels[row][i] == query_labels[row] else _WRONG
                _image(place(row, left + i * cell), images[row, i], frame)
        left += (images.shape[1] + gap) * cell
    if labelled:
        _legend(figure, start, total_width, total_height)
    save(figure, Path(out))


def _legend(figure: Figure, left: float, width: float, height: float) -> None:
    for text, color, offset in (
        ("■ same class as the query", _RIGHT, 0.05),
        ("■ another class", _WRONG, 2.0),
    ):
        figure.text((left + offset) / width, 0.1 / height, text, fontsize=9, color=color)


def _short(name: str) -> str:
    return printable(name, 14)


def _image(axis: Axes, image: Tensor, frame: str | None) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="lanczos")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(frame is not None)
        spine.set_color(frame or "none")
        spine.set_linewidth(2.5)


def neighbours_sheet(
    before: Encode,
    after: Encode,
    splits: Splits,
    out: str | Path,
    *,
    image_size: int,
    resize_ratio: float,
    mean: Sequence[float],
    std: Sequence[float],
    queries: int = 8,
    columns: int = 5,
    max_bank: int = 1000,
    batch_size: int = 256,
    num_workers: int = 2,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    title: str = "",
    skipped: SkippedImages | None = None,
    between: Callable[[], None] | None = None,
) -> None:
    """Draw nearest training images of a few others, by an encoder before and after training.

    Every rank calls it; rank 0 draws. Costs two passes of the encoders over ``max_bank`` images.

    Args:
        before: float32 [B, 3, S, S] -> [B, D], such as the initial encoder's ``features``.
        after: likewise of the trained encoder.
        splits: of a set of shards; queries come from val, or are held out of train.
        out: PNG to write.
        image_size: see :class:`~moco_scale.evaluation.features.Pixels`, as the next three.
        resize_ratio: see there.
        mean: see there.
        std: see there.
        queries: rows; with labels they are of different classes as far as possible.
        columns: neighbours of each encoder.
        max_bank: training images to choose neighbours from.
        batch_size: images encoded at once on each rank.
        num_workers: decoding processes on each rank.
        autocast: half-precision type; None is fp32.
        seed: of the choices.
        title: above everything.
        skipped: as of :func:`~moco_scale.evaluation.features.extract`, as the next one.
        between: see there.

    Raises:
        UserError: An image cannot be read or ``out`` cannot be written; every rank raises it.
    """
    bank, candidates = bank_and_queries(splits, max_bank, seed=seed)
    chosen = candidates.subset(_varied(candidates.labels, queries, seed))
    found = []
    for encode in (before, after):
        rows, sets = [], []
        for shards in (bank, chosen):
            features, _ = extract(
                encode,
                shards,
                image_size=image_size,
                resize_ratio=resize_ratio,
                mean=mean,
                std=std,
                batch_size=batch_size,
                num_workers=num_workers,
                autocast=autocast,
                skipped=skipped,
                between=between,
            )
            if skipped is not None and skipped.places:
                kept = np.setdiff1d(np.arange(len(shards)), list(skipped.places))
                shards = shards.subset(kept)
            rows.append(features)
            sets.append(shards)
        bank, chosen = sets  # without images that cannot be read
        found.append(nearest(rows[0], rows[1], columns))

    def draw() -> None:
        groups = []
        for heading, places in zip(("before training", "after training"), found, strict=True):
            crops = _crops(bank.subset(places.flatten().numpy()), image_size, resize_ratio)
            labels = bank.labels[places.numpy()].tolist()
            groups.append((heading, crops.unflatten(0, tuple(places.shape)), labels))
        neighbours(
            _crops(chosen, image_size, resize_ratio),
            chosen.labels.tolist(),
            groups,
            out,
            classes=chosen.classes,
            title=title,
        )

    consensus.broadcast_from_main(lambda: drawn(draw))


def _varied(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose images by seed, no class twice before each came once: int64 [<= count]."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(labels))
    seen: dict[int, int] = {}
    turn = np.empty(len(order), dtype=np.int64)
    for i, place in enumerate(order):
        turn[i] = seen.get(int(labels[place]), 0)
        seen[int(labels[place])] = int(turn[i]) + 1
    chosen = order[np.argsort(turn, kind="stable")[:count]]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def _crops(shards: Images, image_size: int, resize_ratio: float) -> Tensor:
    """Centre crops of a few images: uint8 [N, 3, S, S]."""
    with evaluation_loader(
        shards, image_size, resize_ratio, batch_size=len(shards), num_workers=0
    ) as loader:
        return next(loader).views[0]
