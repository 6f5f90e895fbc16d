"""The patterns of the demo's pictures: endless plane patterns with a period of about one.

Each takes coordinates `u` and `v` (float arrays of one shape) and a weight in 0..1 that makes lines
and dots thin or bold, and returns where there is ink (bool, same shape).
"""

from collections.abc import Callable

import numpy as np

Pattern = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
_ROW = 0.5 * 3**0.5  # distance of two rows of a triangular lattice of period 1


def _centred(t: np.ndarray) -> np.ndarray:
    """Distance to the middle of the cell that each coordinate lies in, with its sign."""
    return np.asarray(t - np.floor(t) - 0.5)


def _to_lattice_point(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the middle of a cell, in rows of which every other one is shifted by a half."""
    row = np.floor(v / _ROW)
    return np.hypot(_centred(u + 0.5 * (row % 2)), _centred(v / _ROW) * _ROW)


def _bricks(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    row = np.floor(v * 1.3)
    x, y = _centred(u * 0.65 + 0.5 * (row % 2)), _centred(v * 1.3)
    joint = 1.0 - weight
    return (np.abs(x) < 0.45 - 0.06 * joint) & (np.abs(y) < 0.4 - 0.12 * joint)


def _checks(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    return np.asarray((np.floor(u) + np.floor(v)) % 2 == 0)


def _crosses(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    x, y, half = np.abs(_centred(u)), np.abs(_centred(v)), 0.07 + 0.12 * weight
    return (np.minimum(x, y) < half) & (np.maximum(x, y) < 0.38)


def _dots(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    return _to_lattice_point(u, v) < 0.18 + 0.24 * weight


def _honeycomb(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    # The nearer of two rectangular lattices' points is the middle of the hexagon.
    rows = 2 * _ROW
    x1, y1 = _centred(u), _centred(v / rows) * rows
    x2, y2 = _centred(u + 0.5), _centred(v / rows + 0.5) * rows
    first = x1**2 + y1**2 < x2**2 + y2**2
    x, y = np.abs(np.where(first, x1, x2)), np.abs(np.where(first, y1, y2))
    return np.asarray(np.maximum(0.5 * x + _ROW * y, x) > 0.45 - 0.1 * weight)


def _rings(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    distance = _to_lattice_point(u, v)
    return (distance < 0.45) & (distance > 0.37 - 0.2 * weight)


def _scales(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    """Fish scales: rims of discs, each row lying over the one before."""
    v = v * 1.6
    row = np.floor(v)
    rim = np.full(u.shape, False)
    for below in (1, 0):
        middle = row - below
        distance = np.hypot(_centred(u + 0.5 * (middle % 2)), (v - middle) / 1.6)
        rim = np.where(distance < 0.56, distance > 0.46 - 0.15 * weight, rim)
    return rim


def _stripes(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    return np.asarray(np.abs(_centred(u)) < 0.5 * weight)


def _triangles(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    v = v / _ROW
    u = u - 0.5 * v
    return np.asarray(u - np.floor(u) + v - np.floor(v) < 1.0)


def _zigzag(u: np.ndarray, v: np.ndarray, weight: float) -> np.ndarray:
    return _stripes(u + 0.8 * np.abs(_centred(0.7 * v)), v, weight)


PATTERNS: dict[str, Pattern] = {
    "bricks": _bricks,
    "checks": _checks,
    "crosses": _crosses,
    "dots": _dots,
    "honeycomb": _honeycomb,
    "rings": _rings,
    "scales": _scales,
    "stripes": _stripes,
    "triangles": _triangles,
    "zigzag": _zigzag,
}
"""By class name, in alphabetical order."""
