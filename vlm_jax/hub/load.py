"""Loads public checkpoints: the model of a folder, and its parameters on the mesh."""

import collections
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from vlm_jax import axes, sharding
from vlm_jax.config import CheckpointError, UserError
from vlm_jax.config import Mesh as MeshSizes
from vlm_jax.config.validate import check_values
from vlm_jax.hub.families.family import (
    Config,
    Family,
    Json,
    get_or,
)
from vlm_jax.hub.families.registry import config_path, find_family
from vlm_jax.hub.families.table import Row, Target
from vlm_jax.hub.peft.adapter import Adapter, read_adapter
from vlm_jax.hub.peft.merge import check_base, merge
from vlm_jax.hub.tensors.folder import Tensors, list_tensors, open_tensors, read_json
from vlm_jax.hub.tensors.mapped import StoredTensor, tensors_equal
from vlm_jax.hub.tensors.transpose import copy_into, empty_aligned
from vlm_jax.hub.text.tokenizer import (
    HubTokenizer,
    are_ids,
    has_tokenizer,
    stated_ids,
    to_tuple,
)
from vlm_jax.nn.models import abstract_params, build_model
from vlm_jax.runtime.workdir import is_run

THREADS = 2  # parameters assembled at a time; each holds memory
# Output heads and the embeddings that they may be tied to.
HEADS = {
    "decoder/free_head/kernel": "decoder/embedding/table",
    "decoder/added_head/kernel": "decoder/added_embedding/table",
}


class Checkpoint(NamedTuple):
    """A checkpoint folder whose config has been parsed and whose tensors have been checked."""

    folder: Path
    config: Json  # config.json, or OpenCLIP's
    family: Family
    cfg: Config
    rows: list[Row]
    stored_names: dict[str, str]  # name in the table -> name in the files
    adapter: Adapter | None = None  # merged into the tensors

    def stored(self, tensors: Tensors) -> dict[str, StoredTensor]:
        """Returns the tensors by their names in the table, with its adapter if it has one."""
        stored = {name: tensors[stored] for name, stored in self.stored_names.items()}
        if self.adapter is None:
            return stored
        return merge(self.adapter, self.family, self.rows, self._boxes, stored)

    def with_adapter(self, adapter: Adapter, tensors: Tensors) -> "Checkpoint":
        """Returns the checkpoint with an adapter, which is merged into `stored`.

        Raises:
          CheckpointError: the adapter belongs to another model.
        """
        stored = self.stored(tensors)
        adapter = check_base(adapter, self.family, self.rows, self._boxes, stored)
        return self._replace(adapter=adapter)

    @property
    def _boxes(self) -> dict[str, axes.Partitioned]:
        return traverse_util.flatten_dict(abstract_params(self.cfg), sep="/")

    @property
    def image_token(self) -> int | None:
        """Id of the image placeholder token; None: the model has none."""
        return _image_token(self.config, self.family, self.folder)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text; reads the tokenizer only if no config file has them."""
        ids = to_tuple(stated_ids(self.folder, self.config).get("eos_token_id"))
        return ids or (HubTokenizer.load(self.folder).eos_ids if has_tokenizer(self.folder) else ())

    @property
    def start_id(self) -> int | None:
        """Id that starts the decoder of an encoder-decoder; None: no file has one."""
        return read_start_id(self.folder, self.config)


def read_start_id(folder: Path, config: Json) -> int | None:
    """Returns the id that starts the decoder of an encoder-decoder; None: no file has one."""
    stated = stated_ids(folder, config)
    return stated.get("decoder_start_token_id", stated.get("bos_token_id"))


def read_image_token(folder: str | os.PathLike) -> int | None:
    """Returns the id of the image placeholder token of a folder; None: the model has none."""
    path = config_path(Path(os.path.expanduser(folder)))
    config = read_json(path)
    return _image_token(config, find_family(config, str(path)), path.parent)


def _image_token(config: Json, family: Family, folder: Path) -> int | None:
    default = get_or(config, "image_token_index", family.image_token)
    image_token = get_or(config, "image_token_id", default)
    if image_token is not None and not are_ids(image_token):
        raise CheckpointError(f"{folder}: image_token_index is {image_token!r}, but must be an id.")
    return image_token


def load_params(
    folder: str | os.PathLike,
    dtype=None,
    mesh: Mesh | None = None,
    intermediate_layers: str | None = None,
    adapter: str | os.PathLike | None = None,
) -> tuple[nn.Module, dict]:
    """Returns the model of a folder and its parameters; see `load_checkpoint`."""
    checkpoint, params = load_checkpoint(folder, dtype, mesh, intermediate_layers, adapter)
    return build_model(checkpoint.cfg), params


def load_checkpoint(
    folder: str | os.PathLike,
    dtype=None,
    mesh: Mesh | None = None,
    intermediate_layers: str | None = None,
    adapter: str | os.PathLike | None = None,
) -> tuple[Checkpoint, dict]:
    """Loads a folder; each parameter is assembled in its sharding on the mesh.

    Args:
      dtype: of the parameters; None: as stored.
      mesh: of `axes.make_mesh`; None: all devices along `data`. With one device and no mesh, the
        parameters are not committed to a device, as `model.init` returns them: a jitted training
        step that takes its own outputs then compiles once.
      intermediate_layers: see `mllama.select_family`; other families have none.
      adapter: folder of a PEFT adapter, which is merged into the parameters.

    Raises:
      CheckpointError: the folder of a run, no config, an unsupported `model_type`, damaged files,
        tensors that are unknown, missing or of a wrong shape (the message lists them all), or an
        adapter that is not supported or belongs to another model.
    """
    if is_run(folder):
        raise CheckpointError(
            f"{folder} is a run, not a public checkpoint: load it with vlm_jax.from_run."
        )
    with open_tensors(folder) as tensors:
        checkpoint = inspect(folder, tensors, intermediate_layers, adapter)
        boxed = traverse_util.flatten_dict(abstract_params(checkpoint.cfg), sep="/")
        if mesh is None and jax.device_count() > 1:
            mesh = axes.make_mesh(MeshSizes())
        params = dict(read_params(checkpoint.rows, checkpoint.stored(tensors), boxed, dtype, mesh))
    return checkpoint, traverse_util.unflatten_dict(params, sep="/")


def inspect(
    folder: str | os.PathLike,
    tensors: Tensors,
    intermediate_layers: str | None = None,
    adapter: str | os.PathLike | None = None,
) -> Checkpoint:
    """Parses the config and checks names, shapes and dtypes of all tensors; loads none.

    Takes the arguments of `load_checkpoint`.

    Raises:
      CheckpointError: see `load_checkpoint`.
    """
    folder = Path(os.path.expanduser(folder))
    path = config_path(folder)
    config = read_json(path)
    with _error_in(path):
        family = find_family(config, "config.json", intermediate_layers)
        names = family.normalize_names(tensors)
        names = without_copied_head(family, config, names, tensors)
        cfg = family.config_from_hf(config, names)
        check_values(cfg)
        rows = family.table_for(cfg, names)
    _reject_quantized(config, tensors, names, folder)
    check(
        rows,
        {name: tensors[stored].shape for name, stored in names.items()},
        param_shapes(cfg),
        str(folder),
    )
    checkpoint = Checkpoint(folder, config, family, cfg, rows, names)
    if adapter is None:
        return checkpoint
    return checkpoint.with_adapter(read_adapter(adapter), tensors)


def _reject_quantized(
    config: Json, tensors: Tensors, names: Mapping[str, str], folder: Path
) -> None:
    """Raises CheckpointError for weights that need their scales.

    They are integers, or 8-bit floats if config.json names a method. A merged model may still name
    the method of its base.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    names_method = any(part.get("quantization_config") for part in parts)
    needs_scales = ("int", "bool", "float8") if names_method else ("int", "bool")
    quantized = []
    for name in sorted(names.values()):
        dtype = str(tensors[name].dtype)
        if any(kind in dtype for kind in needs_scales):
            quantized.append(f"{name} is {dtype}")
    if quantized:
        raise CheckpointError(
            f"{folder}: quantized weights are not supported: {list_tensors(quantized)}. Use the "
            "model in float32, bfloat16 or float16."
        )


@contextlib.contextmanager
def _error_in(path: Path):
    """Re-raises errors of parsing a config with the name of its file."""
    try:
        yield
    except UserError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: the key {error} is missing.") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: invalid value: {error}.") from error


def without_copied_head(
    family: Family, config: Json, names: Mapping[str, str], tensors: Tensors
) -> Mapping[str, str]:
    """Drops a stored head that equals the embedding it is tied to; pytorch_model.bin has both."""
    stored = {}
    for row in family.param_table(family.config_from_hf(config, names)):
        for target in row.targets:
            stored[target.param] = names.get(row.tensor)
    copies = set()
    for head_param, embedding_param in HEADS.items():
        head, embedding = stored.get(head_param), stored.get(embedding_param)
        if head is None or embedding is None:
            continue
        if not tensors_equal(tensors[head], tensors[embedding]):
            return names
        copies.add(head)
    if not copies:
        return names
    others = {name: stored_name for name, stored_name in names.items() if stored_name not in copies}
    is_tied = family.config_from_hf(config, others).decoder.tie_word_embeddings
    return others if is_tied else names


def param_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of every parameter of the model."""
    boxes = traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    return {path: box.value.shape for path, box in boxes.items()}


def check(rows: list[Row], stored: Mapping[str, tuple[int, ...]], shapes, folder: str) -> None:
    """Compares the table with the stored shapes.

    Raises:
      CheckpointError: tensors are missing, unknown or of a wrong shape.
    """
    expected = {row.tensor: row.stored_shape(shapes) for row in rows}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"{name} is unknown" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        if expected[name] != stored[name]:
            problems.append(
                f"{name} has the shape {stored[name]}, but config.json implies {expected[name]}"
            )
    if problems:
        raise CheckpointError(
            f"{folder}: weights do not match config.json: {list_tensors(problems)}."
        )
    missing = shapes.keys() - {target.param for row in rows for target in row.targets}
    if missing:
        raise AssertionError(f"no row of the table has the parameters {sorted(missing)}")


def read_params(
    rows: list[Row],
    stored: Mapping[str, StoredTensor],
    boxed: Mapping[str, axes.Partitioned],
    dtype,
    mesh: Mesh | None,
) -> Iterator[tuple[str, jax.Array]]:
    """Assembles parameters from the tensors of a checkpoint, and yields (path, parameter).

    THREADS parameters at most are assembled in advance: a caller that quantizes them needs no
    memory for all.

    Args:
      rows: weight table.
      stored: tensors by their names in the table.
      boxed: path -> shape and logical axes of the parameters to load.
      dtype: of the parameters; None: as stored.
      mesh: each device reads its own shard; None: whole arrays, not committed to a device.
    """
    shardings = None if mesh is None else sharding.parameter_shardings(boxed, mesh)
    shapes = {path: box.value.shape for path, box in boxed.items()}
    sources: dict[str, list[tuple[Row, Target]]] = {}
    for row in rows:
        for target in row.targets:
            sources.setdefault(target.param, []).append((row, target))

    def assemble(path):
        tensors = [stored[row.tensor] for row, _ in sources[path]]
        param_dtype = np.dtype(dtype) if dtype is not None else tensors[0].dtype

        def shard(index):
            return _shard(index, shapes, param_dtype, tensors, sources[path])

        if shardings is None:
            array = jax.device_put(shard((slice(None),) * len(shapes[path])))
        else:
            array = jax.make_array_from_callback(shapes[path], shardings[path], shard)
        array.block_until_ready()
        for tensor in tensors:
            tensor.release()
        return array

    with ThreadPoolExecutor(THREADS) as pool:
        pending = collections.deque()
        for path in boxed:
            pending.append((path, pool.submit(assemble, path)))
            if len(pending) > THREADS:
                path, future = pending.popleft()
                yield path, future.result()
        for path, future in pending:
            yield path, future.result()


def _shard(
    index: tuple[slice, ...],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Sequence[StoredTensor],
    sources: Sequence[tuple[Row, Target]],
) -> np.ndarray:
    """Copies the shard `index` of a parameter out of the files, in the order of its own axes.

    Layer by layer, because a merged tensor is made when it is read.
    """
    is_stacked = sources[0][1].layer is not None
    layers, inner = [0], index
    if is_stacked:
        layers, inner = range(len(sources))[index[0]], index[1:]
    by_layer = {target.layer or 0: i for i, (_, target) in enumerate(sources)}
    shard = None
    for n, layer in enumerate(layers):
        i = by_layer[layer]
        row, target = sources[i]
        view = row.from_hf(tensors[i].read(), target, shapes)[inner]
        if shard is None:
            shard = empty_aligned((len(layers), *view.shape), dtype)
        copy_into(shard[n], view)
    return shard if is_stacked else shard[0]
