"""The demo's own labelled pictures: scattered motifs, the class being the motif's shape.

Every picture shows several copies of one shape. Each copy has a colour, a size, a place and a
rotation of its own, over a background with its own colours, gradient, blotches and grain, none of
which depends on the class. Raw pixels therefore say next to nothing about the class, while two
crops of one picture share little else than the shape: what contrastive learning picks up.
"""

import colorsys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

SPLITS = ("train", "val")
SUPERSAMPLING = 3
COPIES = (3, 6)
"""Copies of the shape in a picture, at least and at most; fewer where they find no room."""
RADIUS = (0.17, 0.27)
"""Of a copy, as part of the picture's side."""
LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Weights of R, G and B."""

Outlines = list[np.ndarray]
"""A shape: closed outlines, float [n, 2] within the unit disc; from the second on, holes."""


def _circle(
    radius: float, centre: tuple[float, float] = (0.0, 0.0), points: int = 40
) -> np.ndarray:
    angle = np.linspace(0.0, 2 * np.pi, points, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius + centre


def _regular(corners: int) -> np.ndarray:
    return _circle(1.0, points=corners)


def _star() -> Outlines:
    radius = np.tile([1.0, 0.42], 5)[:, None]
    return [_regular(10) * radius]


def _cross() -> Outlines:
    a, b = 0.95, 0.3
    return [
        np.array(
            [
                *[(b, a), (b, b), (a, b), (a, -b), (b, -b), (b, -a)],
                *[(-b, -a), (-b, -b), (-a, -b), (-a, b), (-b, b), (-b, a)],
            ]
        )
    ]


def _crescent() -> Outlines:
    outer = np.linspace(0.25 * np.pi, 1.75 * np.pi, 40)
    tip = np.array([np.cos(outer[0]), np.sin(outer[0])])
    # The inner arc is centred to the right and runs back through both tips.
    centre, reach = np.array([0.42, 0.0]), float(np.hypot(tip[0] - 0.42, tip[1]))
    start = float(np.arctan2(tip[1], tip[0] - 0.42))
    inner = np.linspace(2 * np.pi - start, start, 40)
    return [
        np.concatenate(
            [
                np.stack([np.cos(outer), np.sin(outer)], axis=1),
                np.stack([np.cos(inner), np.sin(inner)], axis=1) * reach + centre,
            ]
        )
    ]


def _heart() -> Outlines:
    t = np.linspace(0.0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([x, y + 2.5], axis=1) / 17.0]


def _arrow() -> Outlines:
    head, shaft = 0.72, 0.24
    return [
        np.array(
            [
                *[(1.0, 0.0), (0.1, head), (0.1, shaft), (-0.95, shaft)],
                *[(-0.95, -shaft), (0.1, -shaft), (0.1, -head)],
            ]
        )
    ]


def _flower() -> Outlines:
    angle = np.linspace(0.0, 2 * np.pi, 120, endpoint=False)
    radius = 0.62 + 0.38 * np.cos(6 * angle)
    outline = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    return [outline, _circle(0.2)]


def _bolt() -> Outlines:
    return [
        np.array(
            [(0.25, 1.0), (-0.6, -0.12), (-0.08, -0.12), (-0.25, -1.0), (0.6, 0.12), (0.08, 0.12)]
        )
    ]


SHAPES: dict[str, Callable[[], Outlines]] = {
    "arrow": _arrow,
    "bolt": _bolt,
    "crescent": _crescent,
    "cross": _cross,
    "flower": _flower,
    "heart": _heart,
    "ring": lambda: [_circle(0.95), _circle(0.55)],
    "square": lambda: [_regular(4)],
    "star": _star,
    "triangle": lambda: [_regular(3)],
}
CLASSES = tuple(SHAPES)


def _colour(rng: np.random.Generator, luminance: float) -> np.ndarray:
    """Any hue at a luminance in 0..255: float [3] in 0..255."""
    pure = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.2, 1.0), 1.0)) * 255.0
    has = float(pure @ LUMINANCE)
    if luminance <= has:
        return pure * (luminance / has)
    return pure + (255.0 - pure) * ((luminance - has) / (255.0 - has))


def _background(rng: np.random.Generator, size: int, luminance: float) -> np.ndarray:
    """A gradient between two colours, with blotches: float [size, size, 3], about 0..255."""
    first, second = _colour(rng, luminance), _colour(rng, luminance)
    angle, reach = rng.uniform(0.0, 2 * np.pi), rng.uniform(0.0, 0.5)
    axis = np.linspace(-0.5, 0.5, size)
    along = 0.5 + (axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle)) / np.sqrt(2)
    plane = first + (second - first) * (reach * along[..., None])
    cells = int(rng.integers(3, 9))
    coarse = Image.fromarray(rng.uniform(-1.0, 1.0, (cells, cells)).astype(np.float32))
    blotches = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray(plane + blotches[..., None] * rng.uniform(0.0, 18.0))


def _places(rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Centres (float [2]) and radii of the copies, as parts of the side, hardly overlapping."""
    places: list[tuple[np.ndarray, float]] = []
    wanted = int(rng.integers(*COPIES, endpoint=True))
    for _ in range(60):
        if len(places) == wanted:
            break
        radius, centre = rng.uniform(*RADIUS), rng.uniform(0.04, 0.96, 2)
        if all(np.hypot(*(centre - other)) > 0.95 * (radius + r) for other, r in places):
            places.append((centre, radius))
    return places


def _area(outlines: Outlines) -> float:
    """Of a shape, by the shoelace formula."""
    areas = []
    for outline in outlines:
        (x, y), (after_x, after_y) = outline.T, np.roll(outline, -1, axis=0).T
        areas.append(abs(float(x @ after_y - y @ after_x)) / 2)
    return areas[0] - sum(areas[1:])


def render(name: str, rng: np.random.Generator, size: int = 96) -> Image.Image:
    """Draw one picture of class `name`: RGB, `size` x `size` pixels, a function of `rng`'s state.

    Raises KeyError for an unknown class.
    """
    outlines = SHAPES[name]()
    # Halfway to equal areas, so that the amount of ink says little about the class.
    scale = (1.15 / _area(outlines)) ** 0.25
    dark = rng.uniform() < 0.5
    luminance = rng.uniform(60.0, 100.0) if dark else rng.uniform(155.0, 195.0)
    picture = np.clip(_background(rng, size, luminance), 0.0, 255.0)
    for centre, radius in _places(rng):
        contrast = rng.uniform(70.0, 110.0)  # shapes are seen in grayscale too
        colour = _colour(rng, luminance + (contrast if dark else -contrast))
        turn = rng.uniform(0.0, 2 * np.pi)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        mask = Image.new("L", (size * SUPERSAMPLING,) * 2, 0)
        draw = ImageDraw.Draw(mask)
        for i, outline in enumerate(outlines):
            corners = (outline @ rotation * (radius * scale) + centre) * size * SUPERSAMPLING
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=0 if i else 255)
        ink = np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float64)[..., None] / 255.0
        picture = picture * (1.0 - ink) + colour * ink
    grain = rng.normal(0.0, rng.uniform(0.0, 8.0), (size, size, 1))
    return Image.fromarray(np.clip(picture + grain, 0.0, 255.0).astype(np.uint8))


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
    size: int = 96,
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


def contact_sheet(size: int = 96, columns: int = 12, seed: int = 0) -> Image.Image:
    """One row of pictures for each class, to look at."""
    sheet = Image.new("RGB", (columns * (size + 4) + 4, len(CLASSES) * (size + 4) + 4), "white")
    for row, name in enumerate(CLASSES):
        for column in range(columns):
            rng = np.random.default_rng([seed, 0, row, column])
            sheet.paste(render(name, rng, size), (column * (size + 4) + 4, row * (size + 4) + 4))
    return sheet
