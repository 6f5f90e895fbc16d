"""Labelled images of the demo: block prints, whose class is the printed motif.

An image is full of one motif. The first row's place, each print's rotation, size, small shift and
ink colour are random, and the cloth under them changes colour from place to place. So two crops of
an image share only the motif, which contrastive learning picks up, while raw pixels, compared place
by place and colour by colour, tell little about the class. (With one colour for a whole image two
crops would share it, and it would be learned instead.)
"""

from colorsys import hsv_to_rgb
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moco_scale.demo.motifs import INK, MOTIFS
from moco_scale.utils.process_pool import in_order
from moco_scale.utils.progress import progress

SPLITS = ("train", "val")
CLASSES = tuple(MOTIFS)
SIZE = 96
"""Default side of an image in pixels."""
SUPERSAMPLING = 2
ROWS = 4
"""Rows of motifs in an image, and motifs in a row."""
RADIUS = 0.36
"""Radius of a motif, as a share of the distance of two rows."""
PATCHES = 3
"""Colours of the cloth in a row and in a column, one flowing into the next."""
CLOTH = (0.2, 0.7, 0.15, 0.35)
"""Least and greatest saturation and value of its colours; every hue."""
PRINT = (0.0, 0.4, 0.8, 1.0)
"""The same of an ink: always lighter than the cloth."""
GRAIN = 6.0
"""Standard deviation of the noise on each pixel, of 255."""


def _colour(limits: tuple[float, float, float, float], rng: np.random.Generator) -> tuple[int, ...]:
    hue, saturation, value = rng.uniform((0.0, limits[0], limits[2]), (1.0, limits[1], limits[3]))
    return tuple(round(255 * channel) for channel in hsv_to_rgb(hue, saturation, value))


def _cloth(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw colours that flow into each other: float32 [size, size, 3] in 0..255."""
    patches = np.array([[_colour(CLOTH, rng) for _ in range(PATCHES)] for _ in range(PATCHES)])
    image = Image.fromarray(patches.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32)


def _prints(name: str, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the share of ink, float32 [size, size, 1] in 0..1, and its colour times that."""
    side = size * SUPERSAMPLING
    where, colours = Image.new("L", (side, side)), Image.new("RGB", (side, side))
    draw, paint = ImageDraw.Draw(where), ImageDraw.Draw(colours)
    pitch = side / ROWS
    origin = rng.uniform(0.0, 1.0, 2)
    for row in range(-1, ROWS + 1):
        for column in range(-1, ROWS + 1):
            x, y = origin + rng.uniform(-0.12, 0.12, 2)
            middle = np.array([column + x + 0.5 * (row % 2), row + y]) * pitch
            turn = rng.uniform(0.0, 2 * np.pi)
            c, s = np.cos(turn), np.sin(turn)
            scale = RADIUS * rng.uniform(0.9, 1.1) * pitch
            colour = _colour(PRINT, rng)
            for outline, fill in MOTIFS[name]:
                points = outline @ np.array([[c, s], [-s, c]]) * scale + middle
                corners = [(float(x), float(y)) for x, y in points]
                draw.polygon(corners, fill=255 * (fill == INK))
                if fill == INK:
                    paint.polygon(corners, fill=colour)
    ink = np.asarray(where, np.float32)[..., None] / 255.0
    blocks = np.concatenate([ink, ink * np.asarray(colours, np.float32)], axis=2)
    blocks = blocks.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 4).mean(axis=(1, 3))
    return blocks[..., :1], blocks[..., 1:]


def render(name: str, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Draw one image of class `name`: RGB, `size` x `size` pixels, a function of `rng`'s state.

    Raises:
        KeyError: The class is unknown.
    """
    share, ink = _prints(name, rng, size)
    image = _cloth(rng, size) * (1.0 - share) + ink + rng.normal(0.0, GRAIN, (size, size, 1))
    return Image.fromarray(np.clip(image, 0.0, 255.0).astype(np.uint8))


def _write(out: Path, seed: int, size: int, item: tuple[int, int, int]) -> None:
    split, label, number = item
    rng = np.random.default_rng([seed, split, label, number])
    path = out / SPLITS[split] / CLASSES[label] / f"{number:05d}.jpg"
    render(CLASSES[label], rng, size).save(path, quality=92)


def write_folder(
    out: Path,
    *,
    train_per_class: int,
    val_per_class: int,
    seed: int = 0,
    size: int = SIZE,
    processes: int = 2,
) -> None:
    """Write an ImageFolder of JPEGs, `out/train/CLASS/*.jpg` and `out/val/CLASS/*.jpg`.

    Image n of a class is a function of (seed, split, class, n), whatever the number of images or of
    processes.

    Raises:
        FileExistsError: A split exists already.
    """
    for split in SPLITS:
        for name in CLASSES:
            (out / split / name).mkdir(parents=True)
    items = [
        (split, label, number)
        for split, count in enumerate((train_per_class, val_per_class))
        for label in range(len(CLASSES))
        for number in range(count)
    ]
    work = partial(_write, out, seed, size)
    for _ in progress(in_order(work, items, processes), "rendering", len(items), "images"):
        pass


def contact_sheet(size: int = SIZE, columns: int = 12, seed: int = 0) -> Image.Image:
    """Draw one row of images for each class, to look at."""
    gap = 4
    pitch = size + gap
    sheet = Image.new("RGB", (columns * pitch + gap, len(CLASSES) * pitch + gap), "white")
    for row, name in enumerate(CLASSES):
        for column in range(columns):
            rng = np.random.default_rng([seed, 0, row, column])
            sheet.paste(render(name, rng, size), (column * pitch + gap, row * pitch + gap))
    return sheet
