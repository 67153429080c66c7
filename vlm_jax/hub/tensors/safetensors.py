"""safetensors files, memory-mapped, with the dtypes of ml_dtypes.

  8 bytes   N bytes of JSON                                                      without gaps
[ N       | {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ...} | a | b | c ... ]

Format: https://github.com/huggingface/safetensors#format. `safetensors.numpy` does not support
bfloat16, and copies.
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

MAX_HEADER_BYTES = 100_000_000  # as in the reference implementation

# The format's names. Tensors are sorted by this order in a file, widest first, so all are aligned.
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
    """Tensors of a file by name; `data` is the mapped file.

    Raises:
      CheckpointError: the file is damaged or truncated, or its header does not match it.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if start > min(len(data), MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: its header would end at byte {start}."
        )
    header = json_object(data[8:start], f"the header of {path}")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, entry, path) for name, entry in header.items()}
    position = 0
    for name, (begin, end, _, _) in sorted(entries.items(), key=lambda item: item[1][:2]):
        if begin != position:
            raise CheckpointError(
                f"{path}: {name} starts at byte {begin} of the tensors instead of {position}."
            )
        position = end
    if start + position != len(data):
        is_short = start + position > len(data)
        state = "is truncated" if is_short else "continues after its last tensor"
        raise CheckpointError(
            f"{path} {state}: it has {len(data)} bytes, but {start + position} by its header."
        )
    try:
        return {
            name: StoredTensor(data, start + begin, *kind)
            for name, (begin, _, *kind) in entries.items()
        }
    except ValueError as error:  # a shape such as (0, 2**70), which takes no bytes
        raise CheckpointError(f"{path} has a tensor of an impossible shape: {error}.") from None


def _entry(name: str, entry, path: Path) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """Returns (begin, end, dtype, shape) of a header entry; begin and end in bytes."""
    try:
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: {name} has no dtype, shape and two data_offsets in the header."
        ) from None
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has the dtype {entry['dtype']}, but has to have one of "
            f"{', '.join(DTYPES)}."
        )
    are_counts = all_nonnegative_ints(*shape, begin, end)
    if not are_counts or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} and dtype {dtype} cannot fill bytes {begin} to {end}."
        )
    return begin, end, dtype, shape


def write_safetensors(
    file: BinaryIO, specs: Mapping[str, Any], read: Callable[[str], np.ndarray]
) -> None:
    """Writes the header from `specs`, then the tensors that `read` returns, one at a time.

    Raises:
      ValueError: `read` returned a tensor of another shape or dtype than its spec.
    """

    def order(name: str):
        return DTYPE_ORDER.index(np.dtype(specs[name].dtype)), name

    names = sorted(specs, key=order)
    # transformers rejects a file without a format.
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        spec = specs[name]
        begin, position = position, position + size_bytes(spec)
        shape = [int(length) for length in spec.shape]
        header[name] = {
            "dtype": DTYPE_NAMES[np.dtype(spec.dtype)],
            "shape": shape,
            "data_offsets": [begin, position],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        array, spec = read(name), specs[name]
        if (array.shape, array.dtype) != (tuple(spec.shape), spec.dtype):
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, expected {spec.dtype} {spec.shape}"
            )
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def size_bytes(spec) -> int:
    """Bytes of anything with a `shape` and a `dtype`."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def json_object(text: bytes, name: str) -> dict:
    """Parses a JSON object. CheckpointError names the text if it is something else."""
    try:
        value = json.loads(text)
    except UnicodeDecodeError:
        raise CheckpointError(f"{name} is not JSON: it is not a text file in UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is a JSON {type(value).__name__}, not an object.")
    return value
