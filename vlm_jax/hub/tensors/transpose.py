"""Copies of transposed tensors, a cache line at a time.

NumPy copies a transposed matrix element by element along one of its rows, and touches a new cache line with each: 0.5
GB/s where a plain copy makes 7. Strips as wide as a cache line use every line that they touch.
"""

import ml_dtypes
import numpy as np

CACHE_LINE_BYTES = 64


def aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array without values that begins at a cache line: JAX on a CPU takes it over without a copy of its own."""
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size_bytes + CACHE_LINE_BYTES, np.uint8)
    start = -room.ctypes.data % CACHE_LINE_BYTES
    return room[start : start + size_bytes].view(dtype).reshape(shape)


def copy_into(target: np.ndarray, view: np.ndarray) -> None:
    """target[...] = view, for a target in C order and a view of any strides; dtypes may differ."""
    if (view.dtype, target.dtype) == (ml_dtypes.bfloat16, np.float32):
        # The upper half of a float32's bits: moved as whole numbers, which NumPy does at many times the speed.
        bits = target.view(np.uint32)
        copy_into(bits, view.view(np.uint16))
        bits <<= 16
        return
    pair = _as_matrices(target, view)
    if pair is None:
        target[...] = view
        return
    rows, columns = pair
    width = CACHE_LINE_BYTES // target.itemsize
    for start in range(0, rows.shape[1], width):
        rows[:, start : start + width] = columns[:, start : start + width]


def _as_matrices(target, view) -> tuple[np.ndarray, np.ndarray] | None:
    """Both as matrices without copying them, where the view is the transpose of a matrix in C order."""
    for split in range(1, view.ndim):
        shape = (int(np.prod(view.shape[:split])), int(np.prod(view.shape[split:])))
        matrix = view.view()
        try:
            matrix.shape = shape
        except AttributeError:
            continue  # these axes do not lie one in the other
        if abs(matrix.strides[0]) < abs(matrix.strides[1]):
            return target.reshape(shape), matrix
    return None
