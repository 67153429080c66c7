"""Tensors in memory-mapped files; their bytes are not copied."""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.array_utils import byte_bounds

from vlm_jax.config import CheckpointError
from vlm_jax.runtime.lfs import refuse_pointer


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a mapped file. Raises ValueError if it does not fit into the file."""

    data: mmap.mmap
    offset_bytes: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...] | None = None  # None: C order

    def __post_init__(self):
        self.read()

    def read(self) -> np.ndarray:
        """Returns a read-only view. Pages that are touched stay in memory until `release`."""
        # Unlike np.ndarray(buffer=...), frombuffer() keeps the file mapped while the view exists.
        whole = np.frombuffer(self.data, np.uint8)
        return np.ndarray(self.shape, self.dtype, whole, self.offset_bytes, self.strides_bytes)

    def release(self) -> None:
        """Returns the tensor's pages to the system. Views stay valid: they read the file again."""
        first, end = byte_bounds(self.read())
        into_page = self.offset_bytes % mmap.PAGESIZE
        if end > first:
            self.data.madvise(
                mmap.MADV_DONTNEED, self.offset_bytes - into_page, end - first + into_page
            )


def tensors_equal(a: StoredTensor, b: StoredTensor, rows_each: int = 1024) -> bool:
    """Returns True if two matrices are equal; compares `rows_each` rows at a time."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    starts = range(0, len(a.read()), rows_each)
    are_equal = all(
        np.array_equal(a.read()[i : i + rows_each], b.read()[i : i + rows_each]) for i in starts
    )
    a.release()
    b.release()
    return are_equal


def map_file(path: Path) -> mmap.mmap:
    """Maps a file read-only. CheckpointError names a file that cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise CheckpointError(f"{path} is empty.") from None
    refuse_pointer(path, data)
    return data


def all_nonnegative_ints(*values) -> bool:
    """Returns True if all values are ints of 0 or more; bools do not count as ints."""
    return all(type(value) is int and value >= 0 for value in values)
