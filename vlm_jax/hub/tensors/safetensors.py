"""Files of the safetensors format, mapped rather than copied, with the dtypes that NumPy has from ml_dtypes.

 8 bytes      JSON                                                                     tensors, without holes
 [ length N | {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ...}, N bytes | a | b | c ... ]
Format: https://github.com/huggingface/safetensors#format; `safetensors.numpy` refuses bfloat16, and copies.
"""

import json
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.mapped import StoredTensor, all_nonnegative_ints

MAX_HEADER_BYTES = 100_000_000  # as the format's own implementation has it

# The format's names, in the order in which tensors lie in a file: the widest first, so that all are aligned.
DTYPES = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_ORDER = list(DTYPE_NAMES)


def read_safetensors(path: Path, data: mmap.mmap) -> dict[str, StoredTensor]:
    """The tensors of a file; `data` is the file, mapped.

    Raises:
      CheckpointError: the file is damaged, cut short, or its header does not describe it.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if start > min(len(data), MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is no safetensors file or cut short: its header would end at byte {start}."
        )
    header = json_object(data[8:start], f"the header of {path}")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, entry, path) for name, entry in header.items()}
    position = 0
    for name, (begin, end, _, _) in sorted(entries.items(), key=lambda item: item[1][:2]):
        if begin != position:
            raise CheckpointError(
                f"{path}: {name} begins at byte {begin} of the tensors, where {position} is free."
            )
        position = end
    if start + position != len(data):
        state = "is cut short" if start + position > len(data) else "goes on after its last tensor"
        raise CheckpointError(
            f"{path} {state}: it has {len(data)} bytes, not {start + position} as its header says."
        )
    try:
        return {
            name: StoredTensor(data, start + begin, *kind)
            for name, (begin, _, *kind) in entries.items()
        }
    except ValueError as error:  # a shape such as (0, 2**70), that takes no bytes
        raise CheckpointError(f"{path} holds a tensor of an impossible shape: {error}.") from None


def _entry(name: str, entry, path: Path) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """A tensor in the header -> its first byte, the byte after its last, its dtype and its shape."""
    try:
        dtype, shape, (begin, end) = (
            DTYPES.get(entry["dtype"]),
            tuple(entry["shape"]),
            entry["data_offsets"],
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: {name} has no dtype, shape and two data_offsets in the header."
        ) from None
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has the dtype {entry['dtype']}, which is none of {', '.join(DTYPES)}."
        )
    if (
        not all_nonnegative_ints(*shape, begin, end)
        or end - begin != math.prod(shape) * dtype.itemsize
    ):
        raise CheckpointError(
            f"{path}: {name} of shape {shape} and dtype {dtype} cannot fill bytes {begin} to {end}."
        )
    return begin, end, dtype, shape


def write_safetensors(
    file: BinaryIO, specs: Mapping[str, Any], read: Callable[[str], np.ndarray]
) -> None:
    """Writes the header from `specs` and then the tensors as `read` gives them, one at a time.

    Raises:
      ValueError: `read` gave a tensor of another shape or dtype than its spec.
    """
    specs = dict(
        sorted(
            specs.items(), key=lambda item: (DTYPE_ORDER.index(np.dtype(item[1].dtype)), item[0])
        )
    )
    header, position = (
        {"__metadata__": {"format": "pt"}},
        0,
    )  # transformers refuses a file without a format
    for name, spec in specs.items():
        begin, position = position, position + size_bytes(spec)
        shape = [int(length) for length in spec.shape]
        header[name] = {
            "dtype": DTYPE_NAMES[np.dtype(spec.dtype)],
            "shape": shape,
            "data_offsets": [begin, position],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for name, spec in specs.items():
        array = read(name)
        if (array.shape, array.dtype) != (tuple(spec.shape), spec.dtype):
            raise ValueError(
                f"{name} was to be {spec.dtype} {spec.shape} and is {array.dtype} {array.shape}"
            )
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def size_bytes(spec) -> int:
    """Bytes of whatever has a `shape` and a `dtype`."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def json_object(text: bytes, name: str) -> dict:
    """The object that a JSON text holds. CheckpointError names the text where it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is a JSON {type(value).__name__}, not an object.")
    return value
