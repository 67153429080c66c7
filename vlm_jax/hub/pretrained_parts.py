"""Settings and weights of experiments that start from checkpoints.

`vision.checkpoint`, `projector.checkpoint` and `decoder.checkpoint` each name the folder of a
public checkpoint or of a run and take that part of it. The fusion is the experiment's own, and a
part without a folder is initialized as in a new run. `init_from` names one folder for the whole
model, including its fusion and its prompt format.
"""

import functools
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import jax
from flax import traverse_util
from jax.sharding import Mesh

from vlm_jax import sharding
from vlm_jax.config import (
    CheckpointError,
    Data,
    Decoder,
    Experiment,
    Projector,
    Vision,
)
from vlm_jax.config.model import PRETRAINED_PARTS
from vlm_jax.config.validate import check_values, flat, with_fields
from vlm_jax.data.tiling import tag_names
from vlm_jax.hub.families.table import Row, Target, layers_with
from vlm_jax.hub.images.conversion import vision_settings
from vlm_jax.hub.images.files import read_settings
from vlm_jax.hub.load import (
    Checkpoint,
    inspect,
    param_shapes,
    read_image_token,
    read_params,
)
from vlm_jax.hub.peft.start import with_adapter_settings
from vlm_jax.hub.tensors.folder import Tensors, open_tensors
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.dialogue import Dialogue
from vlm_jax.hub.text.prompt_formats import has_own_format
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.nn.blocks import SUBLAYERS, sublayer_of
from vlm_jax.nn.models import Config, abstract_params
from vlm_jax.nn.parts import find_part, is_adapter
from vlm_jax.nn.patches import resample_positions
from vlm_jax.nn.quantized import is_quantized, store_as
from vlm_jax.runtime.workdir import Workdir, is_run

Part = Vision | Projector | Decoder
ReadConfig = Callable[[str], Config]  # folder -> config
# Settings that do not depend on the weights: they stay the experiment's.
EXPERIMENT_FIELDS = {
    "vision": ("patch_embed", "unroll", "remat"),
    "projector": (),
    "decoder": ("unroll", "remat"),
}
# The experiment's as well if the checkpoint is an encoder alone.
ENCODER_USE_FIELDS = ("feature_layers", "keep_class_token", "newline_token")
# The experiment's as well unless the checkpoint encodes tiles together.
TILING_FIELDS = ("tiles", "thumbnail", "tile_tags", "tile_grids", "max_map_tiles")
BLOCK_LENGTH = 4  # number of names in decoder/blocks/layers/block_0
# Interpolated if `vision.image_size_px` is not the checkpoint's.
POSITIONS = "vision/patch_embed/positions"


def resolve_checkpoints(
    cfg: Experiment, explicit: Collection[str] = (), merges_adapter: bool = False
) -> Experiment:
    """Returns the experiment with the settings of its checkpoints and its adapter.

    Args:
      explicit: fields, such as "vision.image_size_px", that the user set in addition to a
        checkpoint.
      merges_adapter: the adapter is not trained, so that its settings do not matter.

    Raises:
      CheckpointError: a folder is not a checkpoint or lacks the part; a projector connects other
        widths; the weights do not fit an explicit value.
    """
    values = flat(cfg)
    requested = {name: values[name] for name in values if name in explicit}
    is_whole_model = bool(cfg.init_from) and not cfg.init_parts
    # Each folder is opened once, whatever number of parts comes from it.
    config_of = functools.cache(read_config)
    if cfg.init_from:
        cfg = _with_init_from(cfg, requested, config_of)
    if cfg.vision.checkpoint:
        vision = _resolve_vision(cfg.vision, is_whole_model, config_of)
        if not cfg.fusion.image_in_sequence:
            vision = replace(vision, newline_token=cfg.vision.newline_token)
        cfg = replace(cfg, vision=vision)
    if cfg.decoder.checkpoint:
        decoder = _part(config_of(cfg.decoder.checkpoint), cfg.decoder, "decoder")
        cfg = replace(cfg, decoder=_keep_own(decoder, cfg.decoder, EXPERIMENT_FIELDS["decoder"]))
        cfg = replace(cfg, data=_resolve_data(cfg, is_whole_model, requested, config_of))
    if cfg.projector.checkpoint:
        cfg = replace(cfg, projector=_resolve_projector(cfg, config_of))
    cfg = _with_requested(cfg, requested)
    if cfg.adapter and is_whole_model and not merges_adapter:
        return with_adapter_settings(cfg, "lora.dropout" in requested)
    return cfg


def _with_init_from(
    cfg: Experiment, requested: Mapping[str, object], config_of: ReadConfig
) -> Experiment:
    """Uses init_from as checkpoint of its parts, and its fusion style if it provides every part."""
    source = config_of(cfg.init_from)
    if not isinstance(source, Experiment):
        raise CheckpointError(
            f"init_from {cfg.init_from} is an encoder without a decoder: use "
            "--vision.checkpoint instead."
        )
    parts = cfg.init_parts or (PRETRAINED_PARTS if source.fusion.has_images else ("decoder",))
    for part in parts:
        if not getattr(cfg, part).checkpoint:
            cfg = replace(cfg, **{part: replace(getattr(cfg, part), checkpoint=cfg.init_from)})
    changes_fusion = requested.get("fusion.kind", source.fusion.kind) != source.fusion.kind
    return cfg if cfg.init_parts or changes_fusion else replace(cfg, fusion=source.fusion)


def _resolve_vision(own: Vision, is_whole_model: bool, config_of: ReadConfig) -> Vision:
    source = config_of(own.checkpoint)
    vision = _part(source, own, "vision")
    own_fields = EXPERIMENT_FIELDS["vision"]
    if is_run(own.checkpoint):
        return _keep_own(vision, own, own_fields)
    vision = replace(vision, **vision_settings(read_settings(own.checkpoint), vision))
    if not isinstance(source, Experiment):
        if not own.feature_layers and vision.final_norm == "pooled":
            # That norm is for the pooled vector, which a decoder does not use.
            vision = replace(vision, final_norm="none")
        vision = replace(vision, pool="none", classes=None, mask_token=False)
        own_fields += ENCODER_USE_FIELDS
    vision = _keep_own(vision, own, own_fields)
    if is_whole_model or vision.tile_layouts:
        return vision
    vision = replace(vision, **{name: getattr(own, name) for name in TILING_FIELDS})
    return replace(vision, resize="squash", resize_px=None) if vision.cut_tiles > 1 else vision


def _resolve_projector(cfg: Experiment, config_of: ReadConfig) -> Projector:
    own, source = cfg.projector, config_of(cfg.projector.checkpoint)
    projector = _keep_own(_part(source, own, "projector"), own, EXPERIMENT_FIELDS["projector"])
    source_widths, widths = _projector_widths(source), _projector_widths(cfg)
    if source_widths != widths:
        raise CheckpointError(
            f"projector.checkpoint {own.checkpoint} projects from width {source_widths[0]} to "
            f"{source_widths[1]}, but vision and decoder of this experiment have widths "
            f"{widths[0]} and {widths[1]}."
        )
    return projector


def _projector_widths(cfg: Experiment) -> tuple[int, int]:
    return cfg.vision.output_width, cfg.decoder.width


def read_config(folder: str) -> Config:
    """Returns the config of a run, or of a public checkpoint after checking its tensors.

    Raises:
      CheckpointError: the folder is neither.
    """
    if is_run(folder):
        return Workdir(folder).read_config()
    with open_tensors(folder) as tensors:
        return inspect(folder, tensors).cfg


def _part(cfg: Config, own: Part, part: str) -> Part:
    """Returns the section of a checkpoint's config for one part of the model."""
    if part == "vision" and isinstance(cfg, Vision):
        return cfg
    section = getattr(cfg, part, None)
    is_text_only = isinstance(cfg, Experiment) and not cfg.fusion.has_images
    if section is None or (part != "decoder" and is_text_only):
        raise CheckpointError(f"{part}.checkpoint {own.checkpoint} has no {part} part.")
    return section


def _keep_own(section: Part, own: Part, names: tuple[str, ...]) -> Part:
    """Returns a checkpoint's section with the experiment's own values of these fields."""
    return replace(section, **{name: getattr(own, name) for name in ("checkpoint", *names)})


def _resolve_data(
    cfg: Experiment,
    is_whole_model: bool,
    requested: Mapping[str, object],
    config_of: ReadConfig,
) -> Data:
    """Returns the data section with special token ids and, for a whole model, prompt format."""
    folder = cfg.decoder.checkpoint
    if is_run(folder):
        names = ["special_ids", "bos_id"]
        names += ["tag_ids"] if cfg.tile_tags else []
        names += ["template"] if is_whole_model else []
        source = config_of(folder).data
        values = {name: getattr(source, name) for name in names}
    else:
        values = _token_settings(cfg, folder, is_whole_model, config_of)
    values = {name: x for name, x in values.items() if f"data.{name}" not in requested}
    return replace(cfg.data, **values)


def _token_settings(
    cfg: Experiment, folder: str, is_whole_model: bool, config_of: ReadConfig
) -> dict[str, object]:
    tokenizer = HubTokenizer.load(folder)
    values: dict[str, object] = {"bos_id": tokenizer.bos_id}
    eos_id = None
    if _uses_template(cfg, config_of(folder), is_whole_model) and has_template(folder):
        values["template"] = "checkpoint"
        eos_id = Dialogue.load(folder, cfg.fusion.has_images).eos_id
    values["special_ids"] = special_ids(tokenizer, cfg.decoder, read_image_token(folder), eos_id)
    if cfg.tile_tags:
        values["tag_ids"] = tuple(
            tuple(tokenizer.encode(name, add_special_tokens=False))
            for name in tag_names(cfg.vision)
        )
    return values


def _uses_template(cfg: Experiment, source: Experiment, is_whole_model: bool) -> bool:
    """Returns whether conversations have the prompt format of the decoder's checkpoint.

    A whole model keeps its format. The format of a text decoder fits every fusion style, and
    replaces the default format only.
    """
    if is_whole_model and source.fusion.style == cfg.fusion.style:
        return True
    is_default = cfg.data.template == Data().template
    return is_default and cfg.data.is_conversations and not source.fusion.has_images


def has_template(folder: str) -> bool:
    """Returns whether a checkpoint defines the format of its prompts."""
    return ChatTemplate.load(folder) is not None or has_own_format(folder)


def special_ids(
    tokenizer: HubTokenizer,
    decoder: Decoder,
    image_id: int | None = None,
    eos_id: int | None = None,
) -> tuple[int, int, int, int]:
    """Returns the ids of padding, image, newline and end of text.

    The tokenizer may lack the first three. The embedding of a padding or image token is never
    used, so any id serves. The image id is the
    first available of: the checkpoint's, a known image token of the tokenizer, an embedding row
    without a token, the end of text (an export then adds a token).

    Raises:
      CheckpointError: no file names a token that ends a text.
    """
    if not tokenizer.eos_ids:
        raise CheckpointError(
            f"decoder.checkpoint {decoder.checkpoint} names no end-of-text token."
        )
    eos = tokenizer.eos_ids[0] if eos_id is None else eos_id
    pad = eos if tokenizer.pad_id is None else tokenizer.pad_id
    newline = eos if tokenizer.newline_id is None else tokenizer.newline_id
    candidates = (image_id, tokenizer.image_id, tokenizer.next_id)
    image = next((i for i in candidates if i is not None and i < decoder.num_ids), eos)
    return pad, image, newline, eos


def _with_requested(cfg: Experiment, requested: Mapping[str, object]) -> Experiment:
    """Applies the explicit values that differ from the checkpoints' settings.

    Raises:
      CheckpointError: the weights do not fit a value.
    """
    settings = flat(cfg)
    stored_shapes = None
    for name, value in requested.items():
        section = name.split(".")[0]
        if section == "fusion":
            folder = cfg.init_from
        else:
            folder = getattr(getattr(cfg, section, None), "checkpoint", "")
        if not folder or settings[name] == value or name.endswith(".checkpoint"):
            continue
        changed = with_fields(cfg, {name: value})
        check_values(changed)
        if stored_shapes is None:
            stored_shapes = pretrained_shapes(cfg)
        if not _fits(pretrained_shapes(changed), stored_shapes, cfg):
            raise CheckpointError(
                f"{name} {value} does not fit the weights of {section}.checkpoint {folder}, "
                f"which have {name} {settings[name]}: leave it out."
            )
        cfg = changed
    return cfg


def pretrained_shapes(cfg: Experiment) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of all parts that start from a checkpoint."""
    return {
        path: shape
        for path, shape in param_shapes(cfg).items()
        if path.split("/")[0] in cfg.pretrained_parts
    }


def _fits(shapes: dict, stored: dict, cfg: Experiment) -> bool:
    """Returns whether stored parameters fit these shapes; positions can be interpolated."""
    if shapes.keys() != stored.keys():
        return False
    differing = {path for path in shapes if shapes[path] != stored[path]}
    return not differing or (differing == {POSITIONS} and not cfg.vision.tile_layouts)


def load_pretrained_parts(cfg: Experiment, shapes: dict, mesh: Mesh) -> dict[str, jax.Array]:
    """Loads the parts that start from public checkpoints, and no others; returns path -> parameter.

    Args:
      shapes: tree of the shapes, dtypes and shardings of all parameters; some may be `Quantized`.
      mesh: each parameter is assembled in its sharding on it.
    """
    params = {}
    flat_shapes = traverse_util.flatten_dict(shapes, sep="/")
    for part in cfg.pretrained_parts:
        if not is_run(getattr(cfg, part).checkpoint):
            params |= _load_part(cfg, part, flat_shapes, mesh)
    return params


def _load_part(cfg: Experiment, part: str, shapes: dict, mesh: Mesh) -> dict[str, jax.Array]:
    folder = getattr(cfg, part).checkpoint
    params = {}
    with open_tensors(folder) as tensors:
        checkpoint = _inspect_with_adapter(cfg, folder, tensors)
        stored_cfg = _with_stored_image_size(cfg, checkpoint.cfg)
        boxed = traverse_util.flatten_dict(abstract_params(stored_cfg), sep="/")
        rows = _part_table(checkpoint, cfg, part)
        paths = {target.param for row in rows for target in row.targets}
        # `read_params` converts to one dtype, and frozen parameters may have another.
        by_dtype = {}
        for path in boxed:
            if path in paths:
                by_dtype.setdefault(shapes[path].dtype, {})[path] = boxed[path]
        stored = checkpoint.stored(tensors)
        for dtype, boxed_of_dtype in by_dtype.items():
            for path, x in read_params(rows, stored, boxed_of_dtype, dtype, mesh):
                if is_quantized(shapes[path]):
                    x = store_as(x, shapes[path], boxed[path].contracted_axes)
                params[path] = x
    return with_positions(cfg, params, mesh)


def _inspect_with_adapter(cfg: Experiment, folder: str, tensors: Tensors) -> Checkpoint:
    """Inspects a checkpoint with the adapter of the experiment, if it is for this folder.

    The adapter is merged; in training, its saved modules alone (`hub.peft.start` has the rest).
    """
    if not cfg.adapter or folder != cfg.init_from:
        return inspect(folder, tensors)
    checkpoint = inspect(folder, tensors, adapter=cfg.adapter)
    if cfg.lora.rank is None:
        return checkpoint
    return checkpoint._replace(adapter=replace(checkpoint.adapter, layers={}))


def _with_stored_image_size(cfg: Experiment, stored: Config) -> Experiment:
    """Returns the experiment with the image size of the stored position table."""
    vision = stored if isinstance(stored, Vision) else stored.vision
    return replace(cfg, vision=replace(cfg.vision, image_size_px=vision.image_size_px))


def with_positions(
    cfg: Experiment, params: dict[str, jax.Array], mesh: Mesh
) -> dict[str, jax.Array]:
    """Interpolates a position table of another image size to `cfg.vision.grid`."""
    table, (rows, columns) = params.get(POSITIONS), cfg.vision.grid
    if table is None or len(table) == rows * columns:
        return params
    side = round(len(table) ** 0.5)
    boxed = traverse_util.flatten_dict(abstract_params(cfg), sep="/")[POSITIONS]
    shardings = sharding.parameter_shardings({POSITIONS: boxed}, mesh)

    def resample(x):
        kind = cfg.vision.resample_positions
        return resample_positions(x, (side, side), (rows, columns), kind).astype(x.dtype)

    resample = jax.jit(resample, out_shardings=shardings[POSITIONS])
    return params | {POSITIONS: resample(table)}


def _part_table(checkpoint: Checkpoint, cfg: Experiment, part: str) -> list[Row]:
    """Returns the weight table of one part, with the parameter paths of the experiment."""
    if isinstance(checkpoint.cfg, Vision):
        return [_with_prefix(row, "vision/") for row in checkpoint.rows]
    rows = [row for row in checkpoint.rows if _is_within(row, f"{part}/")]
    return _restack(rows, checkpoint.cfg, cfg) if part == "decoder" else rows


def _restack(rows: list[Row], stored: Experiment, cfg: Experiment) -> list[Row]:
    """Moves the blocks of a decoder to where the experiment's fusion stacks them.

    Its cross-attention is left out unless the experiment's has the same shapes.
    """
    places = {}
    for name in SUBLAYERS:
        stored_blocks = layers_with(stored.fusion.sublayers(stored.decoder.depth), name)
        own_blocks = layers_with(cfg.fusion.sublayers(cfg.decoder.depth), name)
        for (block, layer), place in zip(stored_blocks, own_blocks):
            places[name, f"decoder/{block}", layer] = place
    crossing = _cross_attention_shapes(stored)
    if crossing == _cross_attention_shapes(cfg):
        crossing = {}
    restacked = []
    for row in rows:
        if crossing.keys().isdisjoint(_params(row)):
            targets = [_move(target, places) for target in row.targets]
            restacked.append(replace(row, targets=tuple(targets)))
    return restacked


def _move(target: Target, places: Mapping) -> Target:
    """Returns a target in another block; `places`: (sublayer, block, layer) -> (block, layer)."""
    if target.layer is None:
        return target
    names = target.param.split("/")
    block, modules = "/".join(names[:BLOCK_LENGTH]), names[BLOCK_LENGTH:]
    new_block, layer = places[sublayer_of(modules[0]), block, target.layer]
    return replace(target, param="/".join(("decoder", new_block, *modules)), layer=layer)


def _cross_attention_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of cross-attention, without adapters.

    With other shapes than the checkpoint's, such as in more blocks, it starts from random weights.
    """
    shapes = {}
    for path, shape in param_shapes(cfg).items():
        names = tuple(path.split("/"))
        if find_part(names) == "cross_attention" and not is_adapter(names):
            shapes[path] = shape
    return shapes


def _params(row: Row) -> list[str]:
    return [target.param for target in row.targets]


def _is_within(row: Row, prefix: str) -> bool:
    return all(param.startswith(prefix) for param in _params(row))


def _with_prefix(row: Row, prefix: str) -> Row:
    targets = [replace(target, param=f"{prefix}{target.param}") for target in row.targets]
    return replace(row, targets=tuple(targets))


def processor_source(cfg: Experiment) -> Path | None:
    """Folder of the tokenizer and processor files that a new run copies; None: none."""
    folder = cfg.decoder.checkpoint
    if not folder:
        return None
    if not is_run(folder):
        return Path(os.path.expanduser(folder))
    processor = Workdir(folder).processor
    return processor if processor.is_dir() else None
