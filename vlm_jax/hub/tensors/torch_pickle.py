"""Reads files of `torch.save` without torch, and without running code from the pickle.

A pickle is a program. A pickle of tensors calls `_rebuild_tensor_v2` on storages. Their bytes are
outside of it: entries of a zip archive, or after the pickle in the legacy format (before torch 1.6).

Format: torch/serialization.py, `_load` and `_legacy_load`.
"""

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vlm_jax.config import CheckpointError, UserError
from vlm_jax.hub.tensors.mapped import StoredTensor, all_nonnegative_ints

ZIP_START = b"PK\x03\x04"
LEGACY_START = [0x1950A86A20F9469CFC6C, 1001]  # magic number, version

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class Storage(NamedTuple):
    key: str
    dtype: np.dtype


class View(NamedTuple):
    """A tensor as torch pickles it; start, shape and strides are in elements of the storage."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class ByteRange(NamedTuple):
    """Position of a storage in the file."""

    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes


def read_torch(path: Path, data: mmap.mmap) -> dict[str, StoredTensor]:
    """Tensors of a state dict, or of the `state_dict` in a training checkpoint, by name.

    Args:
      data: the mapped file.

    Raises:
      CheckpointError: the file is damaged, has no tensors, or would run code.
    """
    try:
        is_zip = data[: len(ZIP_START)] == ZIP_START
        saved, storages = _read_zip(path, data) if is_zip else _read_legacy(path, data)
        views = _views(saved) or _views(saved.get("state_dict", {}))
        tensors = {
            name: _stored_tensor(view, storages[view.storage.key], data)
            for name, view in views.items()
        }
    except UserError:
        raise
    except Exception as error:  # a damaged zip or pickle raises nearly anything
        raise CheckpointError(f"{path} is damaged or has no tensors of torch: {error!r}.") from None
    if not tensors:
        raise CheckpointError(f"{path} has no tensors.")
    return tensors


class _Unpickler(pickle._Unpickler):
    """Creates plain values, dicts and `View`s, and calls nothing else.

    Derived from the Python implementation: for a few wrong bytes, the C implementation allocates
    gigabytes.
    """

    def __init__(self, file, path: Path):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.dtypes = {}  # storage key -> dtype

    def find_class(self, module, name):
        # A pickle may also try to modify what it gets: strings, methods and builtins are immutable.
        if module == "torch" and name in STORAGES:
            return name
        match (module, name):
            case ("collections", "OrderedDict"):
                return OrderedDict
            case ("torch._utils", "_rebuild_tensor_v2"):
                return self._view
            case ("torch._utils", "_rebuild_parameter"):
                return self._parameter
        raise CheckpointError(
            f"{self.path} is an unsafe pickle: it would call {f'{module}.{name}'!r}; only tensors "
            "are loaded."
        )

    def persistent_load(self, saved):
        kind, name, key, _location, _elements, *part = saved
        if kind != "storage" or any(part):  # before torch 0.4 a storage could be a part of another
            raise ValueError("it refers to something other than a whole storage")
        self.dtypes[key] = STORAGES[name]
        return Storage(key, STORAGES[name])

    def _view(self, storage, start, shape, strides, requires_grad, hooks, metadata=None):
        return View(storage, start, shape, strides)

    def _parameter(self, view, requires_grad, hooks):
        return view


def _read_zip(path, data):
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} entries data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if entries.get(folder + "byteorder") and archive.read(folder + "byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        saved = _Unpickler(io.BytesIO(archive.read(pickles[0])), path).load()
    prefix = folder + "data/"
    storages = {
        name.removeprefix(prefix): _content_range(info, data)
        for name, info in entries.items()
        if name.startswith(prefix)
    }
    return saved, storages


def _content_range(info: zipfile.ZipInfo, data: mmap.mmap) -> ByteRange:
    """Position of a zip entry's content, which follows a header of variable length."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    name_bytes, padding_bytes = struct.unpack_from("<HH", data, info.header_offset + 26)
    return ByteRange(info.header_offset + 30 + name_bytes + padding_bytes, info.file_size)


def _read_legacy(path, data):
    """Reads five pickles, then for each storage its number of elements and its bytes."""
    with path.open("rb") as file:
        start = [_Unpickler(file, path).load() for _ in LEGACY_START]
        if start != LEGACY_START:
            raise ValueError("unknown format")
        if not _Unpickler(file, path).load()["little_endian"]:
            raise ValueError("its numbers are big-endian")
        unpickler = _Unpickler(file, path)
        saved = unpickler.load()
        keys = _Unpickler(file, path).load()
        offset = file.tell()
    storages = {}
    for key in keys:
        (elements,) = struct.unpack_from("<q", data, offset)
        storages[key] = ByteRange(offset + 8, elements * unpickler.dtypes[key].itemsize)
        offset = storages[key].end_bytes
    return saved, storages


def _views(saved: dict) -> dict[str, View]:
    return {name: value for name, value in saved.items() if isinstance(value, View)}


def _stored_tensor(view: View, position: ByteRange, data: mmap.mmap) -> StoredTensor:
    storage, start, shape, strides = view
    are_counts = all_nonnegative_ints(start, *shape, *strides, *position)
    if not are_counts or len(shape) != len(strides):
        raise ValueError("a size or stride is not a count")
    last = start + sum((length - 1) * stride for length, stride in zip(shape, strides))
    itemsize = storage.dtype.itemsize
    if math.prod(shape) and (last + 1) * itemsize > position.size_bytes:
        raise ValueError("a tensor extends beyond its storage")
    if position.end_bytes > len(data):
        raise ValueError("it is truncated")
    offset = position.offset_bytes + start * itemsize
    return StoredTensor(
        data, offset, storage.dtype, tuple(shape), tuple(stride * itemsize for stride in strides)
    )
