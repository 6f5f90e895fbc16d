"""Curves of a run, drawn from ``metrics.jsonl``."""

from __future__ import annotations

import io
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moco_scale.untrusted import metrics
from moco_scale.utils.errors import UserError, first_line
from moco_scale.utils.files import write_atomically
from moco_scale.utils.matplotlib_home import matplotlib_home
from moco_scale.utils.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
_LARGEST = 1e30  # value to draw: axes overflow long before a float does
_FAINT = "#9a9a9a"
_BLUE, _ORANGE, _GREEN, _PURPLE = "#1f6fb4", "#d9730d", "#2e8b57", "#7b5ea7"
_STYLE: dict[str, Any] = {"linewidth": 1.6}
_TITLE: dict[str, Any] = {"fontsize": 11, "color": INK, "loc": "left"}


def report(
    path: str | Path,
    out: str | Path,
    *,
    title: str = "",
    chance_loss: float | None = None,
) -> None:
    """Draw the curves of a run: loss, kNN, learning rate, speed.

    Call it on one rank. Cut-off lines and values that are not finite are skipped; of a step that
    was logged twice, the later line counts.

    Args:
        path: of ``metrics.jsonl``.
        out: PNG to write.
        title: above the curves, such as recipe and data set.
        chance_loss: loss of guessing, ln(1 + K) for each term; default: the metrics'
            ``chance_loss``.

    Raises:
        UserError: The metrics cannot be read or the figure cannot be written.
    """
    records = _read(Path(path))
    figure = new_figure(figsize=(10, 6.4), dpi=120, layout="constrained")
    if title:
        figure.suptitle(printable(title), fontsize=13, color=INK)
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        _plain(axis)
        axis.set_xlabel("epoch" if _epochs_known(records) else "step", color=INK)
    _draw_loss(axes[0, 0], records, chance_loss)
    _draw_knn(axes[0, 1], records)
    rate = _curve(records, "lr")
    _draw(axes[1, 0], *rate, _PURPLE)
    axes[1, 0].set_title("learning rate", **_TITLE)
    _draw_speed(axes[1, 1], records)
    places = [x for key in ("loss", "knn_top1", "lr") for x in _curve(records, key)[0]]
    if places and max(places) > 0:
        for axis in axes.flat:
            axis.set_xlim(-0.02 * max(places), 1.02 * max(places))
    save(figure, Path(out))


def new_figure(**options: Any) -> Figure:
    """Make a figure for files; matplotlib is imported here only."""
    with matplotlib_home():
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    # Titles and class names come from outside: a $ in them is no formula.
    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        by_step = {record["step"]: record for record in metrics.records(path)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return [by_step[step] for step in sorted(by_step)]


def _epochs_known(records: list[dict[str, Any]]) -> bool:
    return bool(_steps_per_epoch(records))


def _steps_per_epoch(records: list[dict[str, Any]]) -> float:
    """Compute steps per epoch from lines that end an epoch; 0 when there is none."""
    for record in reversed(records):
        if "epoch_loss" in record and record.get("epoch", 0) > 0:
            return float(record["step"]) / float(record["epoch"])
    return 0.0


def _curve(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return positions (epochs where known, else steps) and finite values of one quantity."""
    scale = _steps_per_epoch(records) or 1.0
    x, y = [], []
    for record in records:
        value = record.get(key)
        if isinstance(value, int | float) and abs(value) < _LARGEST:  # NaN is not
            x.append(record["step"] / scale)
            y.append(float(value))
    return x, y


def _plain(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_FAINT)
    axis.tick_params(colors=INK, labelsize=9)
    axis.grid(True, color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))


def _draw(
    axis: Axes, x: list[float], y: list[float], color: str, label: str = "", dots: bool = False
) -> None:
    if not x:
        axis.text(
            0.5,
            0.5,
            "not recorded",
            color=_FAINT,
            ha="center",
            va="center",
            transform=axis.transAxes,
        )
        return
    marker = "o" if dots or len(x) == 1 else ""
    axis.plot(x, y, color=color, label=label, marker=marker, markersize=4, **_STYLE)


def _draw_loss(axis: Axes, records: list[dict[str, Any]], chance: float | None) -> None:
    x, y = _curve(records, "loss")
    _draw_noisy(axis, x, y)
    if chance is None:
        chance = next(iter(_curve(records, "chance_loss")[1]), None)
    title = "contrastive loss"
    if chance is not None and math.isfinite(chance) and x:
        # In the title: inside the axes it could hide the curve.
        title += f"  (dashed: chance level {chance:.2f})"
        axis.axhline(chance, color=_FAINT, linestyle="--", linewidth=1.2, zorder=1.5)
        axis.margins(y=0.15)
    axis.set_title(title, **_TITLE)


def _draw_noisy(axis: Axes, x: list[float], y: list[float]) -> None:
    """Draw many values faintly, with their running mean on top."""
    if len(x) > 40:
        axis.plot(x, y, color=_BLUE, alpha=0.25, linewidth=0.9)
        y = _smoothed(y, max(len(y) // 40, 3))
    _draw(axis, x, y, _BLUE)


def _smoothed(values: list[float], window: int) -> list[float]:
    """Compute the centred running mean; the window is cut off at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low = np.maximum(places - window // 2, 0)
    high = np.minimum(places + window // 2 + 1, len(values))
    return list((sums[high] - sums[low]) / (high - low))


def _draw_knn(axis: Axes, records: list[dict[str, Any]]) -> None:
    x, y = _curve(records, "knn_top1")
    _, initial = _curve(records, "knn_top1_initial")
    if initial:
        x, y = [0.0, *x], [initial[0], *y]
    axis.set_title("kNN top-1, %" + ("  (at 0: before training)" if initial else ""), **_TITLE)
    _draw(axis, x, y, _GREEN, dots=len(x) <= 40)
    if not x:
        return
    axis.margins(y=0.15)
    for i in {0, len(x) - 1}:
        neighbour = y[1 if i == 0 else i - 1] if len(y) > 1 else y[i]
        above = y[i] >= neighbour
        axis.annotate(
            f"{y[i]:.1f}",
            (x[i], y[i]),
            xytext=(0, 7 if above else -7),
            textcoords="offset points",
            ha="left" if i == 0 else "right",
            va="bottom" if above else "top",
            fontsize=9,
            color=_GREEN,
        )


def _draw_speed(axis: Axes, records: list[dict[str, Any]]) -> None:
    axis.set_title("images per second", **_TITLE)
    _draw_noisy(axis, *_curve(records, "images_per_second"))
    axis.set_ylim(bottom=0)
    x, waits = _curve(records, "data_wait_fraction")
    if not x:
        return
    other = axis.twinx()
    for spine in other.spines.values():
        spine.set_visible(False)
    other.plot(
        x,
        [100 * w for w in waits],
        color=_ORANGE,
        linewidth=1.2,
        marker="o" if len(x) == 1 else "",
        markersize=4,
    )
    other.set_ylim(0, 100)
    other.set_ylabel("waiting for data, %", color=_ORANGE, fontsize=9)
    other.tick_params(colors=_ORANGE, labelsize=9)


def save(figure: Figure, out: Path) -> None:
    """Write a figure as a PNG, atomically.

    Raises:
        UserError: The file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png")
    try:
        write_atomically(out, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


def drawn(draw: Callable[[], None]) -> None:
    """Draw a figure and turn any failure into a UserError, which ends no run.

    Raises:
        UserError: The figure could not be drawn.
    """
    try:
        draw()
    except UserError:
        raise
    except Exception as error:
        traceback.print_exception(error)  # a bug: its place helps to fix it
        raise UserError(f"{type(error).__name__}: {first_line(error)}") from error
