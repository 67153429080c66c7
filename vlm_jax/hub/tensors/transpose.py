"""Copies of transposed tensors, one cache line at a time.

NumPy copies a transposed matrix element by element along one of its rows, and touches a new cache
line with each: 0.5 GB/s, where a plain copy reaches 7. Strips as wide as a cache line use every
line they touch.
"""

import ml_dtypes
import numpy as np

CACHE_LINE_BYTES = 64


def empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Uninitialized array aligned to a cache line, which JAX on a CPU takes over without a copy."""
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size_bytes + CACHE_LINE_BYTES, np.uint8)
    start = -buffer.ctypes.data % CACHE_LINE_BYTES
    return buffer[start : start + size_bytes].view(dtype).reshape(shape)


def copy_into(target: np.ndarray, view: np.ndarray) -> None:
    """Copies a view of any strides into a C-contiguous target; dtypes may differ."""
    if (view.dtype, target.dtype) == (ml_dtypes.bfloat16, np.float32):
        # bfloat16 is the upper half of a float32: NumPy moves the bits as ints many times faster
        # than it converts.
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
    """Both as matrices without a copy, if the view is the transpose of a C-contiguous matrix."""
    for split in range(1, view.ndim):
        shape = (int(np.prod(view.shape[:split])), int(np.prod(view.shape[split:])))
        matrix = view.view()
        # NumPy refuses a shape that would need a copy.
        try:
            matrix.shape = shape
        except AttributeError:
            continue
        if abs(matrix.strides[0]) < abs(matrix.strides[1]):
            return target.reshape(shape), matrix
    return None
