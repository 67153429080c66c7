"""An experiment whose parts begin with public checkpoints, from folders of their own.

`vision.checkpoint`, `projector.checkpoint` and `decoder.checkpoint` name the folders: their configs say what the parts
look like, the fusion is the experiment's. A part without one, and cross-attention, begins as in a new run.
"""

from dataclasses import replace

import jax
from flax import traverse_util
from jax.sharding import Mesh

from vlm_jax.config import ConfigError, Decoder, Experiment, Projector, Vision
from vlm_jax.data.tiles import tag_names
from vlm_jax.hub.files import open_tensors
from vlm_jax.hub.image_settings import read_settings
from vlm_jax.hub.load import Checkpoint, inspect, read_params
from vlm_jax.hub.table import Row
from vlm_jax.hub.tokenizer import HubTokenizer
from vlm_jax.nn.models import Config, boxed_params

Part = Vision | Projector | Decoder
# Settings that are no matter of the weights, and stay the experiment's.
KEPT = {
    "vision": ("checkpoint", "feature_layers", "keep_class_token", "newline_token", "patch_embed", "unroll", "remat"),
    "projector": ("checkpoint",),
    "decoder": ("checkpoint", "unroll", "remat"),
}
TILING = ("tiles", "thumbnail", "tile_tags")  # too, of an encoder that does not read tiles together


def resolved(cfg: Experiment) -> Experiment:
    """The experiment with the settings of its checkpoints in the place of its own.

    Raises:
      ConfigError: a folder that is no checkpoint, or holds no such part; a projector between other widths.
    """
    if cfg.vision.checkpoint:
        cfg = replace(cfg, vision=_resolved_vision(cfg.vision))
    if cfg.decoder.checkpoint:
        decoder = replace(_settings(cfg.decoder, "decoder"), **_kept(cfg.decoder, "decoder"))
        tokenizer = HubTokenizer.load(cfg.decoder.checkpoint)
        begins = -1 if tokenizer.bos_id is None else tokenizer.bos_id
        data = replace(cfg.data, special_ids=special_ids(tokenizer, decoder), bos_id=begins)
        if cfg.tile_tags:
            tags = (tokenizer.encode(name, add_special_tokens=False) for name in tag_names(cfg.vision))
            data = replace(data, tag_ids=tuple(map(tuple, tags)))
        cfg = replace(cfg, decoder=decoder, data=data)
    return replace(cfg, projector=_resolved_projector(cfg)) if cfg.projector.checkpoint else cfg


def _resolved_vision(own: Vision) -> Vision:
    vision = _settings(own, "vision")
    if not own.feature_layers and vision.final_norm == "pooled":
        vision = replace(vision, final_norm="none")  # it is for the pooled vector, which nobody reads here
    processing = read_settings(own.checkpoint)
    normalisation = {"image_mean": tuple(processing.image_mean), "image_std": tuple(processing.image_std)}
    vision = replace(vision, pool="none", classes=0, mask_token=False, **normalisation, **_kept(own, "vision"))
    return vision if vision.tile_layouts else replace(vision, **{name: getattr(own, name) for name in TILING})


def _resolved_projector(cfg: Experiment) -> Projector:
    own, there = cfg.projector, _inspected(cfg.projector.checkpoint)
    projector = replace(_part_of(there, own, "projector"), **_kept(own, "projector"))
    widths, wanted = ((one.vision.output_width, one.decoder.width) for one in (there, cfg))
    if widths != wanted:
        raise ConfigError(
            f"projector.checkpoint {own.checkpoint} leads from {widths[0]} numbers a token to {widths[1]}, where "
            f"vision and decoder of this experiment have {wanted[0]} and {wanted[1]}."
        )
    return projector


def _settings(own: Part, part: str) -> Part:
    return _part_of(_inspected(own.checkpoint), own, part)


def _inspected(folder: str) -> Config:
    with open_tensors(folder) as tensors:
        return inspect(folder, tensors).cfg


def _part_of(cfg: Config, own: Part, part: str) -> Part:
    if part == "vision" and isinstance(cfg, Vision):
        return cfg
    found = getattr(cfg, part, None)
    if found is None or (part != "decoder" and isinstance(cfg, Experiment) and not cfg.fusion.has_images):
        raise ConfigError(f"{part}.checkpoint {own.checkpoint} holds no {part} part.")
    return found


def _kept(own: Part, part: str) -> dict:
    return {name: getattr(own, name) for name in KEPT[part]}


def special_ids(tokenizer: HubTokenizer, decoder: Decoder) -> tuple[int, int, int, int]:
    """Padding, image, newline and end of text in a tokenizer that may have no tokens for the first three.

    An image token takes a special token that has no name. What stands in a slot of padding or of an image is never
    read, so the end of text stands there for want of another.
    """
    if not tokenizer.eos_ids:
        raise ConfigError(f"decoder.checkpoint {decoder.checkpoint} names no token that ends a text.")
    eos = tokenizer.eos_ids[0]
    image = next((i for i in tokenizer.unnamed_ids if i not in tokenizer.eos_ids), eos)
    newline = (tokenizer.encode("\n", add_special_tokens=False) or [eos])[-1]
    return eos if tokenizer.pad_id is None else tokenizer.pad_id, image, newline, eos


def load_parts(cfg: Experiment, shapes: dict, mesh: Mesh) -> dict[str, jax.Array]:
    """Path -> parameter of what the checkpoints hold, each assembled where it lies; of no others.

    `shapes` is the tree of all parameters' shapes: each gets the dtype that stands there.
    """
    found, flat = {}, traverse_util.flatten_dict(shapes, sep="/")
    for part in cfg.begins_with:
        found |= _read_part(cfg, part, flat, mesh)
    return found


def _read_part(cfg: Experiment, part: str, shapes: dict, mesh: Mesh) -> dict[str, jax.Array]:
    folder = getattr(cfg, part).checkpoint
    boxed = traverse_util.flatten_dict(boxed_params(cfg), sep="/")
    with open_tensors(folder) as tensors:
        checkpoint = inspect(folder, tensors)
        rows = _rows(checkpoint, cfg, part)
        filled = {piece.ours for row in rows for piece in row.parts}
        by_dtype = {}
        for path in (path for path in boxed if path in filled):
            by_dtype.setdefault(shapes[path].dtype, {})[path] = boxed[path]
        stored = checkpoint.stored(tensors)
        read = [read_params(rows, stored, wanted, dtype, mesh) for dtype, wanted in by_dtype.items()]
        return {path: x for part in read for path, x in part.items()}


def _rows(checkpoint: Checkpoint, cfg: Experiment, part: str) -> list[Row]:
    """The rows of a part, for where it stands in the experiment."""
    if isinstance(checkpoint.cfg, Vision):
        return [
            replace(row, parts=tuple(replace(p, ours=f"vision/{p.ours}") for p in row.parts)) for row in checkpoint.rows
        ]
    if part == "decoder":
        rows = checkpoint.family.rows(replace(checkpoint.cfg, fusion=cfg.fusion))
        rows = [row for row in rows if row.hub in checkpoint.stored_names]  # a family may have cross-attention, too
    else:
        rows = checkpoint.rows
    return [row for row in rows if all(piece.ours.startswith(f"{part}/") for piece in row.parts)]
