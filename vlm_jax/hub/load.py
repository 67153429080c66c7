"""A folder of a public checkpoint -> a model, its parameters on the mesh, and what turns text and images into input."""

import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from vlm_jax import axes
from vlm_jax.config import CheckpointError, UserError
from vlm_jax.config import Mesh as MeshSizes
from vlm_jax.config.validate import check_values
from vlm_jax.hub.families.family import (
    Config,
    Family,
    Json,
    get_or,
)
from vlm_jax.hub.families.registry import config_path, family_of
from vlm_jax.hub.families.table import Row, Target
from vlm_jax.hub.tensors.folder import Tensors, open_tensors, read_json
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

THREADS = 2  # parameters that are assembled at a time: more would hold more memory


class Checkpoint(NamedTuple):
    """A folder whose config is understood and whose tensors are all accounted for."""

    folder: Path
    config: Json  # config.json, or OpenCLIP's
    family: Family
    cfg: Config
    rows: list[Row]
    stored_names: dict[str, str]  # name in the table -> name in the files

    def stored(self, tensors: Tensors) -> dict[str, StoredTensor]:
        """The tensors by their names in the table."""
        return {name: tensors[found] for name, found in self.stored_names.items()}

    @property
    def image_token(self) -> int | None:
        """The id that stands for an image token in the sequence."""
        return _image_token(self.config, self.family, self.folder)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """`HubTokenizer.eos_ids` of the folder. The tokenizer is read only if no config file states them."""
        ids = to_tuple(stated_ids(self.folder, self.config).get("eos_token_id"))
        return ids or (HubTokenizer.load(self.folder).eos_ids if has_tokenizer(self.folder) else ())

    @property
    def start_id(self) -> int | None:
        """The id that starts the decoder of an encoder-decoder; None where no file names one."""
        return start_id_of(self.folder, self.config)


def start_id_of(folder: Path, config: Json) -> int | None:
    """The id that starts the decoder of an encoder-decoder; None where no file names one."""
    stated = stated_ids(folder, config)
    return stated.get("decoder_start_token_id", stated.get("bos_token_id"))


def image_token_of(folder: str | os.PathLike) -> int | None:
    """The id that stands for an image token in the sequence of the checkpoint in a folder."""
    path = config_path(Path(folder).expanduser())
    config = read_json(path)
    return _image_token(config, family_of(config, str(path)), path.parent)


def _image_token(config: Json, family: Family, folder: Path) -> int | None:
    found = get_or(
        config, "image_token_id", get_or(config, "image_token_index", family.image_token)
    )
    if found is not None and not are_ids(found):
        raise CheckpointError(f"{folder}: image_token_index is {found!r}, but has to be an id.")
    return found


def load_params(
    folder: str | os.PathLike, dtype=None, mesh: Mesh | None = None, taps: str | None = None
) -> tuple[nn.Module, dict]:
    """The model of a folder and its parameters; arguments and errors are those of `load_checkpoint`."""
    checkpoint, params = load_checkpoint(folder, dtype, mesh, taps)
    return build_model(checkpoint.cfg), params


def load_checkpoint(
    folder: str | os.PathLike, dtype=None, mesh: Mesh | None = None, taps: str | None = None
) -> tuple[Checkpoint, dict]:
    """A folder and its parameters, each assembled where it lies on the mesh.

    Args:
      dtype: of the parameters; None: as they are stored.
      mesh: of `axes.make_mesh`; None: all devices along `data`. With one device and no mesh, the parameters are
        committed to no device, as `model.init` returns them: outputs of `jax.jit` then lie as its inputs do, so that a
        training step that takes its own outputs compiles once.
      taps: of `mllama.family_of_taps`; the other families have none.

    Raises:
      CheckpointError: no config, an unknown `model_type`, damaged files, or tensors that are unknown, missing or of a
        wrong shape (all of them are listed).
    """
    with open_tensors(folder) as tensors:
        checkpoint = inspect(folder, tensors, taps)
        boxed = traverse_util.flatten_dict(abstract_params(checkpoint.cfg), sep="/")
        if mesh is None and jax.device_count() > 1:
            mesh = axes.make_mesh(MeshSizes())
        params = read_params(checkpoint.rows, checkpoint.stored(tensors), boxed, dtype, mesh)
    return checkpoint, traverse_util.unflatten_dict(params, sep="/")


def inspect(folder: str | os.PathLike, tensors: Tensors, taps: str | None = None) -> Checkpoint:
    """Reads the config and compares the table with what is stored, before anything is loaded."""
    folder = Path(folder).expanduser()
    path = config_path(folder)
    config = read_json(path)
    with _naming(path):
        family = family_of(config, "config.json", taps)
        names = family.normalize_names(tensors)
        names = without_copied_head(family, config, names, tensors)
        cfg = family.config_from_hf(config, names)
        check_values(cfg)
        rows = family.table_for(cfg, names)
    _refuse_integers(tensors, names, folder)
    check(
        rows,
        {name: tensors[stored].shape for name, stored in names.items()},
        shapes_of(cfg),
        str(folder),
    )
    return Checkpoint(folder, config, family, cfg, rows, names)


def _refuse_integers(tensors: Tensors, names: Mapping[str, str], folder: Path) -> None:
    """Weights that were quantized are numbers only together with their scales."""
    dtypes = {name: str(tensors[name].dtype) for name in sorted(names.values())}
    found = [f"{name} is {dtype}" for name, dtype in dtypes.items() if "float" not in dtype]
    if found:
        raise CheckpointError(
            f"{folder} holds weights that are no floating-point numbers: {'; '.join(found)}."
        )


@contextlib.contextmanager
def _naming(path: Path):
    """What goes wrong while a config is read, in one sentence that names its file."""
    try:
        yield
    except UserError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the key {error}.") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a value that is not understood: {error}.") from error


def without_copied_head(
    family: Family, config: Json, names: Mapping[str, str], tensors: Tensors
) -> Mapping[str, str]:
    """The names without a head that repeats the embedding that it is tied to: `pytorch_model.bin` holds both."""
    stored = {
        part.param: names.get(row.tensor)
        for row in family.param_table(family.config_from_hf(config, names))
        for part in row.targets
    }
    head, embedding = stored.get("decoder/free_head/kernel"), stored.get("decoder/embedding/table")
    if head is None or embedding is None:
        return names
    others = {name: found for name, found in names.items() if found != head}
    is_tied = family.config_from_hf(config, others).decoder.tie_word_embeddings and tensors_equal(
        tensors[head], tensors[embedding]
    )
    return others if is_tied else names


def shapes_of(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model."""
    boxes = traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    return {path: box.value.shape for path, box in boxes.items()}


def check(rows: list[Row], stored: Mapping[str, tuple[int, ...]], shapes, folder: str) -> None:
    """Raises CheckpointError with every tensor that is missing, unknown or of a wrong shape."""
    expected = {row.tensor: row.stored_shape(shapes) for row in rows}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"{name} is unknown" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        if expected[name] != stored[name]:
            problems.append(
                f"{name} has the shape {stored[name]}, not {expected[name]} as config.json says"
            )
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the model of its config.json: " + "; ".join(problems) + "."
        )
    unfed = shapes.keys() - {part.param for row in rows for part in row.targets}
    if unfed:
        raise AssertionError(f"no row of the table fills {sorted(unfed)}")


def read_params(
    rows: list[Row],
    stored: Mapping[str, StoredTensor],
    boxed: Mapping[str, axes.Partitioned],
    dtype,
    mesh: Mesh | None,
) -> dict[str, jax.Array]:
    """The parameters in `boxed` (path -> shape and letters), each assembled from its rows where it lies on the mesh.

    `stored` has the tensors by their names in the table. `mesh` None: whole, and committed to no device.
    """
    shardings = None if mesh is None else axes.parameter_shardings(boxed, mesh)
    shapes = {path: box.value.shape for path, box in boxed.items()}
    sources: dict[str, list[tuple[Row, Target]]] = {}
    for row in rows:
        for part in row.targets:
            sources.setdefault(part.param, []).append((row, part))

    def assemble(path):
        found = [(stored[row.tensor], row, part) for row, part in sources[path]]
        kind = np.dtype(dtype) if dtype is not None else found[0][0].dtype

        def shard(index):
            return _shard(
                index, shapes, kind, [(tensor.read(), row, part) for tensor, row, part in found]
            )

        if shardings is None:
            array = jax.device_put(shard((slice(None),) * len(shapes[path])))
        else:
            array = jax.make_array_from_callback(shapes[path], shardings[path], shard)
        array.block_until_ready()
        for tensor, _, _ in found:
            tensor.release()
        return array

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(boxed, pool.map(assemble, boxed)))


def _shard(index, shapes, dtype, sources) -> np.ndarray:
    """The piece `index` of a parameter, copied out of the files in the order of its own axes."""
    turns = range(len(sources))[index[0]] if sources[0][2].layer is not None else range(1)
    inner = index[1:] if sources[0][2].layer is not None else index
    by_turn = {part.layer or 0: (array, row, part) for array, row, part in sources}
    views = [
        row.from_hf(array, part, shapes)[inner]
        for array, row, part in (by_turn[turn] for turn in turns)
    ]
    piece = empty_aligned((len(views), *views[0].shape), dtype)
    for target, view in zip(piece, views):
        copy_into(target, view)
    return piece if sources[0][2].layer is not None else piece[0]
