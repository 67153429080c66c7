"""What a run begins with: parameters and tokenizer of public checkpoints, of other runs, or new ones."""

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
from vlm_jax.hub.text.dialogue import Dialogue
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.runtime.workdir import Workdir, is_run
from vlm_jax.structs import State
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.step import abstract_state

SUBLAYERS = ("cross_mlp", "cross", "self", "mlp")  # the longest name first
LAYERS = "decoder/blocks/layers/"


def load_parts(cfg: Experiment, like: State, mesh: Mesh) -> dict[str, jax.Array]:
    """Path -> parameter of all parts that begin with a checkpoint, where `like` wants it; of no others."""
    found = pretrained_parts.load_pretrained_parts(cfg, like.params, mesh)
    wanted = traverse_util.flatten_dict(like.params, sep="/")
    for folder in dict.fromkeys(getattr(cfg, part).checkpoint for part in cfg.pretrained_parts):
        if is_run(folder):
            parts = [
                part for part in cfg.pretrained_parts if getattr(cfg, part).checkpoint == folder
            ]
            found |= _of_run(cfg, folder, parts, wanted, mesh)
    return found


def _of_run(
    cfg: Experiment, folder: str, parts: list[str], wanted: Mapping, mesh: Mesh
) -> dict[str, jax.Array]:
    source = Workdir(folder).read_config()
    flat = traverse_util.flatten_dict(load_state(source, mesh=mesh).params, sep="/")
    flat = {path: x for path, x in flat.items() if path.split("/")[0] in parts}
    flat = pretrained_parts.with_positions(cfg, restacked(flat, source, cfg), mesh)
    found = {path: x for path, x in flat.items() if path in wanted}
    return {
        path: jax.device_put(x.astype(wanted[path].dtype), wanted[path].sharding)
        for path, x in found.items()
    }


def load_state(cfg: Experiment, step: int | None = None, mesh: Mesh | None = None) -> State:
    """The state of a checkpoint of a run, of the last whole one by default, in the dtypes in which it keeps them.

    Args:
      step: of the checkpoint; None: the last one.
      mesh: where the parameters lie; None: that of the run.

    Raises:
      ConfigError: there is none, or none is whole.
    """
    workdir = Workdir(cfg.workdir)
    if not workdir.checkpoints.is_dir():
        raise ConfigError(f"--workdir {workdir.path} holds no checkpoint.")
    checkpoints = Checkpoints(workdir.checkpoints, cfg.train)
    like = abstract_state(cfg, axes.make_mesh(cfg.mesh) if mesh is None else mesh)
    restored = checkpoints.restore(like, step)
    checkpoints.close()
    if restored is None:
        raise ConfigError(f"--workdir {workdir.path} holds no checkpoint yet.")
    return restored[0]


def restacked(params: Mapping, source: Experiment, target: Experiment) -> dict:
    """Parameters by path, with the decoder's layers stacked as the target's fusion style stacks them.

    Cross-attention is left out where the two have it in other blocks.
    """
    blocks = [cfg.fusion.sublayers(cfg.decoder.depth) for cfg in (source, target)]
    if blocks[0] == blocks[1]:
        return dict(params)
    found = {path: x for path, x in params.items() if not path.startswith(LAYERS)}
    layers: dict[str, dict[int, object]] = {}
    for path, stack in params.items():
        if path.startswith(LAYERS):
            _restack(path, stack, blocks, layers)
    return found | {
        path: jnp.stack([slices[turn] for turn in sorted(slices)])
        for path, slices in layers.items()
    }


def _restack(path: str, stack, blocks, layers: dict[str, dict[int, object]]) -> None:
    """Distributes one stacked parameter of the source over the target's stacks."""
    block, _, rest = path.removeprefix(LAYERS).partition("/")
    sublayer = next(name for name in SUBLAYERS if rest.startswith(name))
    old, new = (layers_with(all_blocks, sublayer) for all_blocks in blocks)
    if len(old) != len(new):
        return
    for (source, turn), (target, other_turn) in zip(old, new, strict=True):
        if source == f"blocks/layers/{block}":
            layers.setdefault(f"decoder/{target}/{rest}", {})[other_turn] = stack[turn]


def load_tokenizer(cfg: Experiment) -> Tokenizer:
    """The tokenizer that is kept in the work folder, that of the decoder's checkpoint, or one trained now."""
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
    if cfg.data.template != "checkpoint":
        return None
    if folder is None or not folder.is_dir():
        raise ConfigError(
            "data.template checkpoint needs the chat template of a public checkpoint: name its folder in init_from, or "
            "choose plain, vicuna or caption."
        )
    return Dialogue.load(folder, cfg.fusion.has_images)


def keep_processor(cfg: Experiment, workdir: Workdir) -> None:
    """Copies the files that lie beside the weights of the decoder's checkpoint, so that the run can do without it."""
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
