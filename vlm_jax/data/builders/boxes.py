"""Boxes of objects in images."""

import numpy as np

# Left, top, right and bottom, as shares of the width and height of an image.
Box = tuple[float, float, float, float]


def coverage(box: Box, grid: tuple[int, int]) -> np.ndarray:
    """Returns the share of each cell of a grid, (rows, columns), that a box covers."""
    left, top, right, bottom = box
    rows, columns = grid
    return np.outer(_overlap(top, bottom, rows), _overlap(left, right, columns))


def _overlap(start: float, end: float, cells: int) -> np.ndarray:
    """Returns the share of each of the equal parts of [0, 1] that [start, end] covers."""
    edges = np.linspace(0, 1, cells + 1)
    covered = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return np.maximum(covered, 0) * cells
