"""Initial parameters and tokenizer of a run: of public checkpoints, of other runs, or new ones."""

import shutil
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from vlm_jax import axes
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data import pipeline
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub import pretrained_parts
from vlm_jax.hub.export import COPIED_FILES
from vlm_jax.hub.families.table import layers_with
from vlm_jax.hub.peft import start
from vlm_jax.hub.text.dialogue import Dialogue
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.nn import lora
from vlm_jax.nn.blocks import sublayer_of
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.quantized import store_as
from vlm_jax.runtime.workdir import Workdir, is_run
from vlm_jax.structs import State
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.step import abstract_state

LAYERS = "decoder/blocks/layers/"


def load_parts(cfg: Experiment, like: State, mesh: Mesh) -> dict[str, jax.Array]:
    """Loads the parameters of all pretrained parts.

    Args:
      like: dtypes and shardings of the state.

    Returns:
      Path -> parameter, of pretrained parts alone.
    """
    params = pretrained_parts.load_pretrained_parts(cfg, like.params, mesh)
    shapes = traverse_util.flatten_dict(like.params, sep="/")
    parts_of_folder: dict[str, list[str]] = {}
    for part in cfg.pretrained_parts:
        parts_of_folder.setdefault(getattr(cfg, part).checkpoint, []).append(part)
    for folder, parts in parts_of_folder.items():
        if is_run(folder):
            params |= _load_parts_of_run(cfg, folder, parts, shapes, mesh)
    if cfg.adapter and cfg.lora.rank is not None:
        params |= _load_adapters(cfg, shapes)
    return params


def _load_adapters(cfg: Experiment, shapes: Mapping) -> dict[str, jax.Array]:
    """Lays the parameters of `cfg.adapter` out on the mesh."""
    params = {}
    for path, x in start.load_adapters(cfg).items():
        sharding = shapes[path].sharding
        params[path] = jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    return params


def _load_parts_of_run(
    cfg: Experiment, folder: str, parts: list[str], shapes: Mapping, mesh: Mesh
) -> dict[str, jax.Array]:
    source = Workdir(folder).read_config()
    merged = lora.merge(source.lora, load_state(source, mesh=mesh).params)
    params = traverse_util.flatten_dict(merged, sep="/")
    params = {path: x for path, x in params.items() if path.split("/")[0] in parts}
    params = pretrained_parts.with_positions(cfg, restack(params, source, cfg), mesh)
    boxes = traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    return {
        path: store_as(x, shapes[path], boxes[path].contracted_axes)
        for path, x in params.items()
        if path in shapes
    }


def load_state(cfg: Experiment, step: str | int | None = None, mesh: Mesh | None = None) -> State:
    """Loads the state of a checkpoint of a run, in the dtypes of the run.

    Args:
      step: of the checkpoint, or "best"; None or "last": the last complete one.
      mesh: of the parameters; None: the mesh of the run.

    Raises:
      ConfigError: no checkpoint exists, or all are damaged.
    """
    workdir = Workdir(cfg.workdir)
    if not workdir.checkpoints.is_dir():
        raise ConfigError(f"--workdir {workdir.path} has no checkpoint.")
    checkpoints = Checkpoints(workdir.checkpoints, cfg.train)
    mesh = axes.make_mesh(cfg.mesh) if mesh is None else mesh
    restored = checkpoints.restore(abstract_state(cfg, mesh), workdir.find_step(step))
    checkpoints.close()
    if restored is None:
        raise ConfigError(f"--workdir {workdir.path} has no checkpoint yet.")
    return restored[0]


def restack(params: Mapping, source: Experiment, target: Experiment) -> dict:
    """Returns parameters by path with the decoder's layers stacked as in the target.

    Fusion styles differ in the repeating pattern of blocks over which layers are stacked.
    Cross-attention is left out if the two have it in different blocks.
    """
    source_blocks = source.fusion.sublayers(source.decoder.depth)
    target_blocks = target.fusion.sublayers(target.decoder.depth)
    if source_blocks == target_blocks:
        return dict(params)
    restacked: dict[str, jax.Array] = {}
    layers_of_path: dict[str, dict[int, jax.Array]] = {}
    for path, stack in params.items():
        if path.startswith(LAYERS):
            _distribute(path, stack, source_blocks, target_blocks, layers_of_path)
        else:
            restacked[path] = stack
    for path, layers in layers_of_path.items():
        restacked[path] = jnp.stack([layers[index] for index in sorted(layers)])
    return restacked


def _distribute(path: str, stack, source_blocks, target_blocks, layers_of_path: dict) -> None:
    """Distributes the layers of one stacked parameter of the source over the target's stacks."""
    block, _, rest = path.removeprefix(LAYERS).partition("/")
    sublayer = sublayer_of(rest.partition("/")[0])
    source_places = layers_with(source_blocks, sublayer)
    target_places = layers_with(target_blocks, sublayer)
    if len(source_places) != len(target_places):
        return
    for (old_path, old_index), (new_path, new_index) in zip(source_places, target_places):
        if old_path == f"blocks/layers/{block}":
            layers = layers_of_path.setdefault(f"decoder/{new_path}/{rest}", {})
            layers[new_index] = stack[old_index]


def load_tokenizer(cfg: Experiment) -> Tokenizer:
    """Loads the tokenizer of the work folder or decoder checkpoint, or trains a new one."""
    workdir = Workdir(cfg.workdir)
    if workdir.tokenizer.exists():
        return Tokenizer.load(
            workdir.tokenizer, cfg.data.special_ids, _dialogue(cfg, workdir.processor)
        )
    folder = cfg.decoder.checkpoint
    if not folder:
        return pipeline.train_tokenizer(cfg)
    dialogue = _dialogue(cfg, pretrained_parts.processor_source(cfg))
    if is_run(folder):
        return Tokenizer.load(Workdir(folder).tokenizer, cfg.data.special_ids, dialogue)
    return Tokenizer(HubTokenizer.load(folder).backend, cfg.data.special_ids, dialogue)


def _dialogue(cfg: Experiment, folder) -> Dialogue | None:
    if "checkpoint" not in cfg.data.templates:
        return None
    if folder is None or not folder.is_dir():
        raise ConfigError(
            "data.template checkpoint needs the chat template of a public checkpoint: set "
            "init_from to its folder, or choose plain, vicuna or caption."
        )
    return Dialogue.load(folder, cfg.fusion.has_images)


def keep_processor(cfg: Experiment, workdir: Workdir) -> None:
    """Copies the decoder's processor files, so that the run no longer needs the checkpoint."""
    source = pretrained_parts.processor_source(cfg)
    if source is None or workdir.processor.exists():
        return
    stage = workdir.processor.with_name(workdir.processor.name + ".tmp")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    for name in ("config.json", *COPIED_FILES):
        if (source / name).is_file():
            shutil.copy(source / name, stage / name)
    stage.rename(workdir.processor)
