"""Motifs of the demo's images: small shapes about one unit in radius.

A motif is a list of closed polygons (float arrays [points, 2], y downwards) with their fills, drawn
in order: ink, or the ground again for a hole.
"""

import numpy as np

INK, GROUND = 1, 0
Motif = tuple[tuple[np.ndarray, int], ...]


def _regular(corners: int, radius: float) -> np.ndarray:
    angles = np.arange(corners) * (2 * np.pi / corners)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _disc(radius: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    return _regular(24, radius) + np.array([x, y])


def _bar(length: float, width: float) -> np.ndarray:
    return np.array([(-length, -width), (length, -width), (length, width), (-length, width)])


def _star(points: int, radius: float, inner: float) -> np.ndarray:
    corners = _regular(2 * points, radius)
    corners[1::2] *= inner
    return corners


_CROSS = np.array([(0.3, 1), (0.3, 0.3), (1, 0.3), (1, -0.3), (0.3, -0.3), (0.3, -1)])

MOTIFS: dict[str, Motif] = {
    "bars": ((_bar(1.25, 0.28), INK),),
    "beans": ((_disc(1.0) * np.array([1.1, 0.55]), INK),),
    "crosses": ((np.concatenate([_CROSS, -_CROSS]), INK),),
    "discs": ((_disc(0.85), INK),),
    "frames": ((_regular(4, 1.2), INK), (_regular(4, 0.75), GROUND)),
    "moons": ((_disc(0.95), INK), (_disc(0.8, 0.45), GROUND)),
    "rings": ((_disc(0.95), INK), (_disc(0.55), GROUND)),
    "specks": tuple((_disc(0.3, x, y), INK) for x, y in _regular(4, 0.75)),
    "stars": ((_star(5, 1.15, 0.42), INK),),
    "triangles": ((_regular(3, 1.15), INK),),
}
"""By class name, in alphabetical order."""
