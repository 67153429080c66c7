"""Weight files of a folder in the layout of the Hugging Face hub: one file, or shards and index."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
# In order of preference.
READABLE = (
    WEIGHTS,
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# OWNER/NAME, NAME, or the URL of the model's page.
HUB_NAME = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
    r"(\w[\w.-]*(?:/\w[\w.-]*)?)"
    r"/?(?:tree/.*)?"
)
ADAPTER_CONFIG = "adapter_config.json"
PARTIAL = ".partial"  # folder of incomplete files
MAX_LISTED = 3  # tensors in a message
INDEX = ".index.json"  # suffix of the index of a file split into shards


def existing_folder(folder: str | os.PathLike) -> Path:
    """Returns the path of a folder.

    Raises:
      CheckpointError: it does not exist; for a name on the hub, with the command that downloads it.
    """
    path, text = Path(os.path.expanduser(folder)), str(folder)
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
    """Tensors in the files of a folder, by name; as a context manager, closes the files."""

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
        # A view that still exists keeps its file open until it is deleted.
        for data in {stored.data for stored in self.values()}:
            with contextlib.suppress(BufferError):
                data.close()


def list_tensors(described: Sequence[str]) -> str:
    """Returns the first `MAX_LISTED` descriptions of tensors and the number of the others."""
    more = f" and {len(described) - MAX_LISTED} more" if len(described) > MAX_LISTED else ""
    return "; ".join(described[:MAX_LISTED]) + more


def open_tensors(folder: str | os.PathLike, names: Sequence[str] = READABLE) -> Tensors:
    """Opens the first of the weight files `names` that a folder has.

    Raises:
      CheckpointError: the folder does not exist or has no weights, a shard is missing or lacks a
        tensor, a file is damaged or truncated, or a pickle would run code.
    """
    folder = existing_folder(folder)
    path = _find_weights(folder, names)
    if path is None:
        if (folder / ADAPTER_CONFIG).is_file():
            base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise CheckpointError(
                f"{folder} is an adapter of PEFT, not a whole model: name its base model, "
                f"{base or 'which it does not state'}, as the checkpoint, and {folder} with "
                "--adapter."
            )
        raise CheckpointError(
            f"{folder} has no weights: expected one of {', '.join(names)}, or its {INDEX}."
        )
    return Tensors(_read_shards(path) if path.name.endswith(INDEX) else _read_file(path))


def _find_weights(folder: Path, names: Sequence[str] = READABLE) -> Path | None:
    """Path of the first weight file of `names`, or its index, in a folder."""
    candidates = (folder / (name + suffix) for name in names for suffix in ("", INDEX))
    return next((path for path in candidates if os.path.isfile(path)), None)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(shard, str) and shard == Path(shard).name for shard in shards):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files beside it.")
    missing = [shard for shard in sorted(set(shards)) if not os.path.isfile(index.parent / shard)]
    if missing:
        raise CheckpointError(f"{index} names missing files: {', '.join(missing)}.")
    files = {shard: _read_file(index.parent / shard) for shard in sorted(set(shards))}
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise CheckpointError(f"{index} maps {name} to {shard}, which does not contain it.")
    return {name: files[shard][name] for name, shard in weight_map.items()}


def _read_file(path: Path) -> dict[str, StoredTensor]:
    data = map_file(path)
    return read_torch(path, data) if path.suffix == ".bin" else read_safetensors(path, data)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a file. Raises UserError if it cannot be read or is a Git LFS pointer."""
    try:
        data = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    refuse_pointer(path, data)
    return data


def read_json(path: str | os.PathLike) -> dict:
    """Object of a JSON file. Raises UserError if it cannot be read or is not a JSON object."""
    return json_object(read_bytes(path), str(path))


def write_tensors(
    folder: str | os.PathLike,
    specs: Mapping[str, Any],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int = 5_000_000_000,
    file_name: str = WEIGHTS,
) -> None:
    """Writes `file_name`, or, if that exceeds `max_shard_bytes`, shards in the order of `specs`.

    They appear when all are complete; until then, and after an error, the folder has no weights.

    Args:
      specs: name -> anything with the `shape` and `dtype` of the tensor (an array, a StoredTensor,
        a ShapeDtypeStruct).
      read: name -> tensor; called as each tensor is written, so only one needs to be in memory.
      file_name: ends with `.safetensors`; shards have a number before that.

    Raises:
      CheckpointError: the folder cannot be written or has weights already, or safetensors does not
        support a dtype.
      ValueError: `read` returned a tensor of another shape or dtype than its spec.
    """
    folder = Path(os.path.expanduser(folder))
    unknown = [
        f"{name} is {spec.dtype}"
        for name, spec in specs.items()
        if np.dtype(spec.dtype) not in DTYPE_NAMES
    ]
    if unknown:
        raise CheckpointError(
            f"{folder} cannot be written: {', '.join(unknown)}; safetensors supports "
            f"{', '.join(DTYPE_NAMES.values())}."
        )
    shards = _split_into_shards(specs, max_shard_bytes)
    weight_map, stem = {}, file_name.removesuffix(".safetensors")
    with all_or_none(folder) as stage:
        for number, names in enumerate(shards, start=1):
            shard = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) == 1:
                shard = file_name
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
    """Yields a folder to write a model to, and moves its files to `folder` at the end.

    After an error `folder` gets none of them. Can be nested: `folder` may be one that it yielded.

    Raises:
      CheckpointError: the folder cannot be written or has weights already.
    """
    folder = Path(os.path.expanduser(folder))
    path = _find_weights(folder)
    if path is not None:
        raise CheckpointError(f"{path} already exists: choose another folder, or delete it.")
    stage, is_new, moved = folder / PARTIAL, not os.path.exists(folder), []
    try:
        shutil.rmtree(stage, ignore_errors=True)  # leftovers of a process that was killed
        stage.mkdir(parents=True)
        yield stage
        # JSON files last: an index must not appear before its shards.
        for path in sorted(stage.iterdir(), key=lambda path: path.suffix == ".json"):
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


def _split_into_shards(specs: Mapping[str, Any], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, in lists of at most `max_shard_bytes`; a larger tensor has its own list."""
    shards, filled = [[]], 0
    for name, spec in specs.items():
        size = size_bytes(spec)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
