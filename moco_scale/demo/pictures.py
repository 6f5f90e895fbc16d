"""The demo's own labelled pictures: printed cloth, the class being the pattern of the print.

Colours, size, place, direction and contrast of the pattern, a slight warp, and the light that falls
on the cloth are drawn for each picture and do not depend on the class. Raw pixels therefore say
little about it, and a network as initialised mostly sees colours and light; two crops of one
picture have the pattern in common, which is what contrastive learning picks up.
"""

import colorsys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from moco_scale.demo.patterns import PATTERNS

SPLITS = ("train", "val")
CLASSES = tuple(PATTERNS)
SIZE = 96
"""Default side of a picture in pixels."""
SUPERSAMPLING = 2
PERIOD = (0.18, 0.28)
"""Shortest and longest period of a pattern, as part of the picture's side."""
DIRECTION = 180.0
"""A pattern is turned by up to so many degrees either way."""
LIGHT = 0.5
"""Largest logarithm of how much light and shade change the brightness."""
LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Weights of R, G and B."""


def _colour(rng: np.random.Generator, luminance: float) -> np.ndarray:
    """Any hue at a luminance in 0..255: float [3] in 0..255."""
    pure = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.2, 1.0), 1.0)) * 255.0
    has = float(pure @ LUMINANCE)
    if luminance <= has:
        return pure * (luminance / has)
    return pure + (255.0 - pure) * ((luminance - has) / (255.0 - has))


def _dye(rng: np.random.Generator, size: int, luminance: float) -> np.ndarray:
    """A gradient between two colours of the same luminance: float [size, size, 3] in 0..255."""
    first, second = _colour(rng, luminance), _colour(rng, luminance)
    angle, reach = rng.uniform(0.0, 2 * np.pi), rng.uniform(0.4, 1.0)
    axis = np.linspace(-0.5, 0.5, size)
    along = 0.5 + (axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle)) / np.sqrt(2)
    return np.asarray(first + (second - first) * (reach * along[..., None]))


def _light(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft light and shade, factors of the brightness: float [size, size, 1]."""
    cells = int(rng.integers(2, 5))
    coarse = Image.fromarray(rng.uniform(-LIGHT, LIGHT, (cells, cells)).astype(np.float32))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray(np.exp(smooth)[..., None])


def _print(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Where the ink of a pattern is: float [size, size, 1] in 0..1."""
    side = size * SUPERSAMPLING
    axis = ((np.arange(side) + 0.5) / side).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    period = np.exp(rng.uniform(*np.log(PERIOD)))
    turn = np.radians(rng.uniform(-DIRECTION, DIRECTION))
    for _ in range(2):
        wave = rng.normal(0.0, 4.0, 2)
        shift = rng.uniform(0.0, 0.015) * np.sin(wave[0] * x + wave[1] * y + rng.uniform(0, 7))
        x, y = x + shift, y + shift * rng.uniform(-1.0, 1.0)
    # Coordinates in periods, from anywhere in the endless pattern.
    u = (x * np.cos(turn) + y * np.sin(turn)) / period + rng.uniform(0.0, 50.0)
    v = (y * np.cos(turn) - x * np.sin(turn)) / period + rng.uniform(0.0, 50.0)
    ink = PATTERNS[name](u, v, rng.uniform(0.4, 0.6))
    blocks = ink.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    return np.asarray(blocks.mean(axis=(1, 3))[..., None])


def render(name: str, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Draw one picture of class `name`: RGB, `size` x `size` pixels, a function of `rng`'s state.

    Raises KeyError for an unknown class.
    """
    ink = _print(name, rng, size)
    dark = rng.uniform(80.0, 110.0)
    light = dark + rng.uniform(60.0, 90.0)
    ground, print_ = (dark, light) if rng.uniform() < 0.5 else (light, dark)
    cloth = _dye(rng, size, ground) * (1.0 - ink) + _dye(rng, size, print_) * ink
    cloth = cloth * _light(rng, size) + rng.normal(0.0, 4.0, (size, size, 1))
    return Image.fromarray(np.clip(cloth, 0.0, 255.0).astype(np.uint8))


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

    Picture n of a class is a function of (seed, split, class, n) alone: neither of how many there
    are nor of how many processes draw them. Raises FileExistsError where a split exists already.
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
    with ProcessPoolExecutor(processes) as pool:
        done = pool.map(work, items, chunksize=32)
        for _ in tqdm(done, "Rendering", len(items), unit="picture", disable=None):
            pass


def contact_sheet(size: int = SIZE, columns: int = 12, seed: int = 0) -> Image.Image:
    """One row of pictures for each class, to look at."""
    gap = 4
    pitch = size + gap
    sheet = Image.new("RGB", (columns * pitch + gap, len(CLASSES) * pitch + gap), "white")
    for row, name in enumerate(CLASSES):
        for column in range(columns):
            rng = np.random.default_rng([seed, 0, row, column])
            sheet.paste(render(name, rng, size), (column * pitch + gap, row * pitch + gap))
    return sheet
