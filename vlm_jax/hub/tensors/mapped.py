"""A tensor that lies in a file: its bytes are mapped into memory, never copied."""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.array_utils import byte_bounds

from vlm_jax.config import CheckpointError
from vlm_jax.runtime.lfs import refuse_pointer


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Where in a mapped file a tensor lies. Making one raises ValueError where it does not fit into the file."""

    data: mmap.mmap
    offset_bytes: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...] | None = None  # None: C order

    def __post_init__(self):
        self.read()

    def read(self) -> np.ndarray:
        """A read-only view of the file's bytes; what is touched of it counts as memory until `release`."""
        whole = np.frombuffer(
            self.data, np.uint8
        )  # unlike np.ndarray, it keeps the file from being unmapped under it
        return np.ndarray(self.shape, self.dtype, whole, self.offset_bytes, self.strides_bytes)

    def release(self) -> None:
        """Gives the tensor's pages back to the system. Views stay valid: they read the file anew."""
        first, beyond = byte_bounds(self.read())
        into_page = self.offset_bytes % mmap.PAGESIZE
        if beyond > first:
            self.data.madvise(
                mmap.MADV_DONTNEED, self.offset_bytes - into_page, beyond - first + into_page
            )


def tensors_equal(a: StoredTensor, b: StoredTensor, rows_each: int = 1024) -> bool:
    """Whether two matrices hold the same numbers; little of them is in memory at a time."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    starts = range(0, len(a.read()), rows_each)
    same = all(np.array_equal(*(x.read()[i : i + rows_each] for x in (a, b))) for i in starts)
    a.release()
    b.release()
    return same


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read-only. CheckpointError names the file where it cannot be read or was not downloaded."""
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
    """Whether all are whole numbers of 0 or more; True is none, though Python calls it an int."""
    return all(type(value) is int and value >= 0 for value in values)
