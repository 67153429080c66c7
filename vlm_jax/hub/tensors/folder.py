"""Folders of tensors as Hugging Face's hub holds them: one file, or shards and the index that names them."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import CheckpointError
from vlm_jax.hub.tensors.mapped import StoredTensor, map_file
from vlm_jax.hub.tensors.safetensors import (
    DTYPE_NAMES,
    json_object,
    read_safetensors,
    size_bytes,
    write_safetensors,
)
from vlm_jax.hub.tensors.torch_pickle import read_torch
from vlm_jax.runtime.lfs import refuse_pointer

WEIGHTS = "model.safetensors"
READABLE = (
    WEIGHTS,
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # best first
HUB_NAME = re.compile(  # OWNER/NAME, NAME, or the address of its page
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?(\w[\w.-]*(?:/\w[\w.-]*)?)/?(?:tree/.*)?"
)
PARTIAL = ".partial"  # a folder of files that are not complete
INDEX = ".index.json"  # added to the name of the file that was split


def existing_folder(folder: str | os.PathLike) -> Path:
    """The path of a folder. CheckpointError where there is none, with the way to it where it may be a name on the hub."""
    path, text = Path(folder).expanduser(), str(folder)
    if os.path.isdir(path):
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: name the folder that holds the checkpoint.")
    name = HUB_NAME.fullmatch(text)
    if name is None:
        raise CheckpointError(f"{path} is not a folder: it does not exist.")
    local = f"checkpoints/{name[1].rpartition('/')[2]}"
    raise CheckpointError(
        f"{text} is not a folder: if it is a model on the Hugging Face hub, download it first with "
        f"`hf download {name[1]} --local-dir {local}`, and name {local} instead."
    )


class Tensors(Mapping[str, StoredTensor]):
    """Names -> tensors in the files of a folder; leaving it as a context closes the files."""

    def __init__(self, stored: dict[str, StoredTensor]):
        self._stored = stored

    def __getitem__(self, name: str) -> StoredTensor:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for data in {stored.data for stored in self.values()}:
            with contextlib.suppress(
                BufferError
            ):  # a view that is still held keeps its file until it dies
                data.close()


def open_tensors(folder: str | os.PathLike) -> Tensors:
    """The tensors of the weights in a folder: `READABLE` lists the names that are looked for, best first.

    Raises:
      CheckpointError: no folder, no weights in it, a shard that is missing or lacks a tensor, a file that is damaged or
        cut short, or a pickle that wants to run code.
    """
    folder = existing_folder(folder)
    found = _find(folder)
    if found is None:
        raise CheckpointError(
            f"{folder} holds no weights: there is no {', '.join(READABLE)}, nor {INDEX} of one of them."
        )
    return Tensors(_read_shards(found) if found.name.endswith(INDEX) else _read_file(found))


def _find(folder: Path) -> Path | None:
    candidates = (folder / (name + ending) for name in READABLE for ending in ("", INDEX))
    return next((path for path in candidates if os.path.isfile(path)), None)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(shard, str) and shard == Path(shard).name for shard in shards):
        raise CheckpointError(
            f"{index} has no weight_map from names of tensors to files beside it."
        )
    missing = [shard for shard in sorted(set(shards)) if not os.path.isfile(index.parent / shard)]
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}.")
    files = {shard: _read_file(index.parent / shard) for shard in sorted(set(shards))}
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise CheckpointError(
                f"{index} says that {name} is in {shard}, which does not hold it."
            )
    return {name: files[shard][name] for name, shard in weight_map.items()}


def _read_file(path: Path) -> dict[str, StoredTensor]:
    data = map_file(path)
    return read_torch(path, data) if path.suffix == ".bin" else read_safetensors(path, data)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a file. CheckpointError names a file that is missing or a Git LFS pointer."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    refuse_pointer(path, data)
    return data


def read_json(path: str | os.PathLike) -> dict:
    """Object of a JSON file. CheckpointError names a file that cannot be read or holds something else."""
    return json_object(read_bytes(path), str(path))


def write_tensors(
    folder: str | os.PathLike,
    specs: Mapping[str, Any],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int = 5_000_000_000,
    file_name: str = WEIGHTS,
) -> None:
    """Writes `file_name`, or, where that is more than `max_shard_bytes`, shards in the order of `specs`.

    They appear when all are complete; until then, and after an error, the folder has no weights.

    Args:
      specs: name -> whatever has the `shape` and `dtype` of the tensor (an array, a StoredTensor, a ShapeDtypeStruct).
      file_name: ends with `.safetensors`; shards have a number before that.
      read: name -> the tensor; called when it is written, so that one at a time has to be in memory.

    Raises:
      CheckpointError: the folder cannot be written or holds weights already, or safetensors does not know a dtype.
      ValueError: `read` gave a tensor of another shape or dtype than its spec.
    """
    folder = Path(folder).expanduser()
    unknown = [
        f"{name} is {spec.dtype}"
        for name, spec in specs.items()
        if np.dtype(spec.dtype) not in DTYPE_NAMES
    ]
    if unknown:
        raise CheckpointError(
            f"{folder} cannot be written: {', '.join(unknown)}; safetensors knows {', '.join(DTYPE_NAMES.values())}."
        )
    shards = _shards(specs, max_shard_bytes)
    weight_map, stem = {}, file_name.removesuffix(".safetensors")
    with all_or_none(folder) as stage:
        for number, names in enumerate(shards, start=1):
            shard = (
                file_name
                if len(shards) == 1
                else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            )
            weight_map |= dict.fromkeys(names, shard)
            with (stage / shard).open("wb") as file:
                write_safetensors(file, {name: specs[name] for name in names}, read)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(map(size_bytes, specs.values()))},
                "weight_map": weight_map,
            }
            (stage / (file_name + INDEX)).write_text(json.dumps(index, indent=2, sort_keys=True))


@contextlib.contextmanager
def all_or_none(folder: str | os.PathLike) -> Iterator[Path]:
    """Gives a folder to write a model in; its files appear in `folder` at the end, together, or none after an error.

    Within the folder that it gave, it can be used again.

    Raises:
      CheckpointError: the folder cannot be written, or holds weights already.
    """
    folder = Path(folder).expanduser()
    found = _find(folder)
    if found is not None:
        raise CheckpointError(f"{found} is there already: choose another folder, or delete it.")
    stage, is_new, moved = folder / PARTIAL, not os.path.exists(folder), []
    try:
        shutil.rmtree(stage, ignore_errors=True)  # what is left of a process that was killed
        stage.mkdir(parents=True)
        yield stage
        for path in sorted(
            stage.iterdir(), key=lambda path: path.suffix == ".json"
        ):  # what names others comes last
            moved.append(folder / path.name)
            os.replace(path, moved[-1])
    except BaseException as error:
        for path in moved:
            path.unlink(missing_ok=True)
        shutil.rmtree(stage, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and folder.name != PARTIAL:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror}.") from None
        raise
    stage.rmdir()


def _shards(specs: Mapping[str, Any], max_shard_bytes: int) -> list[list[str]]:
    """Names in their order, in lists of at most so many bytes; a larger tensor is alone."""
    shards, filled = [[]], 0
    for name, spec in specs.items():
        size = size_bytes(spec)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
