"""Contact sheet of a data set's images, to look at before a week of training."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moco_scale.data.images.decode import DecodeError, decode_rgb
from moco_scale.data.sampling.random import permutation
from moco_scale.data.shards.protocols import Shards
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import write_atomically
from moco_scale.utils.text import printable

COLUMNS, ROWS = 8, 8
_TILE, _GAP, _CAPTION, _MARGIN, _TITLE, _NAMES = 132, 10, 16, 24, 56, 170
_LONGEST = 200  # characters of a text that are measured: the sheet is no wider than these
_PAPER, _INK, _FAINT, _EMPTY = "#ffffff", "#1f2328", "#6e7781", "#eceff2"


def contact_sheet(shards: Shards, out: Path, seed: int = 0) -> None:
    """Draw a seeded choice of images, a row a class, or mixed where classes are small or missing.

    Every image is shown whole and upright, with its size in pixels.

    Args:
        shards: the images.
        out: PNG to write; must not exist.
        seed: of the choice.

    Raises:
        UserError: `out` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"--sheet {out} exists; name another file, or remove it")
    rows = _chosen(shards, seed)
    left = _MARGIN + (_NAMES if any(name for name, _, _ in rows) else 0)
    columns = max(len(places) for _, _, places in rows)
    width = left + columns * (_TILE + _GAP) - _GAP + _MARGIN
    step = _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (width, _TITLE + len(rows) * step + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, middle, small = (ImageFont.load_default(size) for size in (19, 14, 11))
    classes = f", {len(shards.classes)} classes" if shards.classes else ""
    title = f"{shards.name}   {shards.split}: {len(shards):,} images{classes}"
    title = _fitted(title, width - 2 * _MARGIN, large)
    draw.text((_MARGIN, _MARGIN), title, _INK, large, anchor="lm")
    for row, (name, count, places) in enumerate(rows):
        top = _TITLE + row * step
        if name:
            text = _fitted(name, _NAMES - 16, middle)
            draw.text((_MARGIN, top + _TILE / 2 - 9), text, _INK, middle, anchor="lm")
            label = f"{count:,} image{'s' * (count != 1)}"
            draw.text((_MARGIN, top + _TILE / 2 + 10), label, _FAINT, small, anchor="lm")
        for column, place in enumerate(places):
            corner = left + column * (_TILE + _GAP), top
            size = _tile(sheet, draw, shards, place, corner, small)
            below = corner[0] + _TILE / 2, top + _TILE + 9
            number = int(shards.labels[place])
            caption = size if name or number < 0 else f"{shards.classes[number]}  {size}"
            draw.text(below, _fitted(caption, _TILE, small), _FAINT, small, anchor="mm")
    content = io.BytesIO()
    sheet.save(content, "PNG")
    try:
        write_atomically(out, content.getvalue())
    except OSError as error:
        raise UserError(f"--sheet {out} cannot be written: {error.strerror or error}") from error


def _chosen(shards: Shards, seed: int) -> list[tuple[str, int, list[int]]]:
    """Choose (class, number of its images, places in the set) of each row; "": of any class."""
    order = permutation(len(shards), seed, "contact sheet", 0)
    labels = shards.labels[order]
    present = np.unique(labels[labels >= 0])
    # Rows of a class are worth it where there are images to fill them.
    if not len(present) or np.median(np.bincount(labels[labels >= 0])[present]) < COLUMNS / 2:
        places = order[: COLUMNS * ROWS].tolist()
        return [("", 0, places[i : i + COLUMNS]) for i in range(0, len(places), COLUMNS)]
    some = present[np.unique(np.linspace(0, len(present) - 1, ROWS).astype(np.int64))]
    return [
        (shards.classes[c], int((labels == c).sum()), order[labels == c][:COLUMNS].tolist())
        for c in some.tolist()
    ]


def _tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    shards: Shards,
    place: int,
    corner: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> str:
    """Draw one image; return its caption."""
    left, top = corner
    try:
        image = Image.fromarray(decode_rgb(shards.read(place)))
    except DecodeError:
        draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), _EMPTY)
        middle = left + _TILE / 2, top + _TILE / 2
        draw.text(middle, "cannot be\ndecoded", _FAINT, font, anchor="mm", align="center")
        return shards.place(place).key
    scale = _TILE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    at = left + (_TILE - size[0]) // 2, top + (_TILE - size[1]) // 2
    sheet.paste(image.resize(size, how), at)
    return f"{image.width} x {image.height}"


def _fitted(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a text, also a foreign one, to one line of this width."""
    text = printable(text, _LONGEST)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
