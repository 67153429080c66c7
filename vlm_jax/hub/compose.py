"""Experiments that begin with checkpoints: settings and weights of parts, or of a whole model.

`vision.checkpoint`, `projector.checkpoint` and `decoder.checkpoint` each name a folder, of a public checkpoint or of a
run, whose part it is; the fusion is the experiment's, and a part without a folder begins as in a new run. `init_from`
names one folder for the whole model: its fusion and the form of its prompts are taken as well.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import jax
from flax import traverse_util
from jax.sharding import Mesh

from vlm_jax import axes
from vlm_jax.config import (
    CheckpointError,
    Data,
    Decoder,
    Experiment,
    Projector,
    Vision,
)
from vlm_jax.config.validate import check_values, flat, with_fields
from vlm_jax.data.tiling import tag_names
from vlm_jax.hub.families.table import Row
from vlm_jax.hub.images.settings import read_settings, vision_settings
from vlm_jax.hub.load import (
    Checkpoint,
    image_token_of,
    inspect,
    read_params,
    shapes_of,
)
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.dialogue import Dialogue
from vlm_jax.hub.text.prompt_formats import has_own_form
from vlm_jax.hub.text.tokenizer import HubTokenizer
from vlm_jax.nn.models import Config, abstract_params
from vlm_jax.nn.patches import resample_positions
from vlm_jax.runtime.workdir import Workdir, is_run

PARTS = ("vision", "projector", "decoder")
Part = Vision | Projector | Decoder
# Settings that the weights do not decide: they stay the experiment's.
COMPUTED_AS = {
    "vision": ("patch_embed", "unroll", "remat"),
    "projector": (),
    "decoder": ("unroll", "remat"),
}
# Neither does an encoder that was published alone.
OF_THE_USE = ("feature_layers", "keep_class_token", "newline_token")
TILING = ("tiles", "thumbnail", "tile_tags")  # nor, where it does not read tiles together
POSITIONS = "vision/patch_embed/positions"  # interpolated where `vision.image_size_px` is another


def resolved(cfg: Experiment, explicit: Collection[str] = ()) -> Experiment:
    """The experiment with the settings of its checkpoints.

    Args:
      explicit: fields, such as "vision.image_size_px", whose values the user asked for beside a checkpoint.

    Raises:
      CheckpointError: a folder that is not a checkpoint, or lacks such a part; a projector between other widths; an
        explicit value that the weights do not fit.
    """
    wanted = {name: value for name, value in flat(cfg).items() if name in explicit}
    whole = bool(cfg.init_from) and not cfg.init_parts
    if cfg.init_from:
        cfg = _with_init_from(cfg, wanted)
    if cfg.vision.checkpoint:
        cfg = replace(cfg, vision=_vision(cfg.vision, whole))
    if cfg.decoder.checkpoint:
        cfg = replace(cfg, decoder=_kept(_settings(cfg.decoder, "decoder"), cfg.decoder, "decoder"))
        cfg = replace(cfg, data=_data(cfg, whole, wanted))
    if cfg.projector.checkpoint:
        cfg = replace(cfg, projector=_projector(cfg))
    return _with_wanted(cfg, wanted)


def _with_init_from(cfg: Experiment, wanted: dict[str, object]) -> Experiment:
    """The experiment with `init_from` as the folder of its parts and, if those are all, with its fusion."""
    source = config_of(cfg.init_from)
    if not isinstance(source, Experiment):
        raise CheckpointError(
            f"init_from {cfg.init_from} is an encoder without a decoder: name it with --vision.checkpoint."
        )
    parts = cfg.init_parts or (PARTS if source.fusion.has_images else ("decoder",))
    for part in parts:
        if not getattr(cfg, part).checkpoint:
            cfg = replace(cfg, **{part: replace(getattr(cfg, part), checkpoint=cfg.init_from)})
    asks_for_another = wanted.get("fusion.kind", source.fusion.kind) != source.fusion.kind
    return cfg if cfg.init_parts or asks_for_another else replace(cfg, fusion=source.fusion)


def _vision(own: Vision, whole: bool) -> Vision:
    source = config_of(own.checkpoint)
    vision = _part_of(source, own, "vision")
    if is_run(own.checkpoint):
        return _kept(vision, own, "vision")
    vision = replace(vision, **vision_settings(read_settings(own.checkpoint), vision))
    if isinstance(source, Experiment):
        vision = _kept(vision, own, "vision")
    else:
        if not own.feature_layers and vision.final_norm == "pooled":
            vision = replace(
                vision, final_norm="none"
            )  # it is for the pooled vector, which is not used here
        vision = replace(vision, pool="none", classes=0, mask_token=False)
        vision = _kept(vision, own, "vision", OF_THE_USE)
    if whole or vision.tile_layouts:
        return vision
    vision = replace(vision, **{name: getattr(own, name) for name in TILING})
    return replace(vision, resize="squash", resize_px=0) if vision.cut_tiles > 1 else vision


def _projector(cfg: Experiment) -> Projector:
    own, source = cfg.projector, config_of(cfg.projector.checkpoint)
    projector = _kept(_part_of(source, own, "projector"), own, "projector")
    widths, wanted = _widths(source), _widths(cfg)
    if widths != wanted:
        raise CheckpointError(
            f"projector.checkpoint {own.checkpoint} leads from {widths[0]} numbers a token to {widths[1]}, where "
            f"vision and decoder of this experiment have {wanted[0]} and {wanted[1]}."
        )
    return projector


def _widths(cfg: Experiment) -> tuple[int, int]:
    return cfg.vision.output_width, cfg.decoder.width


def _settings(own: Part, part: str) -> Part:
    return _part_of(config_of(own.checkpoint), own, part)


def config_of(folder: str) -> Config:
    """The config of a public checkpoint, whose tensors are checked against it, or of a run.

    Raises:
      CheckpointError: the folder is neither.
    """
    if is_run(folder):
        return Workdir(folder).read_config()
    with open_tensors(folder) as tensors:
        return inspect(folder, tensors).cfg


def _part_of(cfg: Config, own: Part, part: str) -> Part:
    if part == "vision" and isinstance(cfg, Vision):
        return cfg
    found = getattr(cfg, part, None)
    if found is None or (
        part != "decoder" and isinstance(cfg, Experiment) and not cfg.fusion.has_images
    ):
        raise CheckpointError(f"{part}.checkpoint {own.checkpoint} holds no {part} part.")
    return found


def _kept(found: Part, own: Part, part: str, more: tuple[str, ...] = ()) -> Part:
    """The settings of a checkpoint, with the experiment's own where the weights do not decide."""
    names = ("checkpoint", *COMPUTED_AS[part], *more)
    return replace(found, **{name: getattr(own, name) for name in names})


def _data(cfg: Experiment, whole: bool, wanted: dict[str, object]) -> Data:
    """The tokens with a meaning, and for a whole model the form of its prompts."""
    folder = cfg.decoder.checkpoint
    if is_run(folder):
        source = Workdir(folder).read_config()
        names = ("special_ids", "bos_id", "tag_ids") if cfg.tile_tags else ("special_ids", "bos_id")
        names += ("template",) if whole else ()
        values = {name: getattr(source.data, name) for name in names}
    else:
        values = _token_settings(cfg, folder, whole)
    return replace(
        cfg.data, **{name: x for name, x in values.items() if f"data.{name}" not in wanted}
    )


def _token_settings(cfg: Experiment, folder: str, whole: bool) -> dict[str, object]:
    tokenizer = HubTokenizer.load(folder)
    values: dict[str, object] = {"bos_id": tokenizer.bos_id}
    eos_id = None
    if whole and has_template(folder) and config_of(folder).fusion.style == cfg.fusion.style:
        values["template"] = "checkpoint"
        eos_id = Dialogue.load(folder, cfg.fusion.has_images).eos_id
    values["special_ids"] = special_ids(tokenizer, cfg.decoder, image_token_of(folder), eos_id)
    if cfg.tile_tags:
        names = tag_names(cfg.vision)
        values["tag_ids"] = tuple(
            tuple(tokenizer.encode(name, add_special_tokens=False)) for name in names
        )
    return values


def has_template(folder: str) -> bool:
    """Whether a checkpoint decides how its prompts are written."""
    return ChatTemplate.load(folder) is not None or has_own_form(folder)


def special_ids(
    tokenizer: HubTokenizer,
    decoder: Decoder,
    image_id: int | None = None,
    eos_id: int | None = None,
) -> tuple[int, int, int, int]:
    """Padding, image, newline and end of text in a tokenizer that may have no tokens for the first three.

    The token in a slot of padding or of an image is never read, so any token can stand there. That of an image is the
    checkpoint's, or `IMAGE_TOKENS` of the tokenizer, or a row of the embedding that has no token yet, or the end of
    text: an export then adds one.

    Raises:
      CheckpointError: no file names a token that ends a text.
    """
    if not tokenizer.eos_ids:
        raise CheckpointError(
            f"decoder.checkpoint {decoder.checkpoint} names no token that ends a text."
        )
    eos = tokenizer.eos_ids[0] if eos_id is None else eos_id
    rows = decoder.vocab_size + decoder.extra_tokens
    choices = (image_id, tokenizer.image_id, tokenizer.next_id)
    image = next((i for i in choices if i is not None and i < rows), eos)
    newline = tokenizer.newline_id
    return (
        eos if tokenizer.pad_id is None else tokenizer.pad_id,
        image,
        eos if newline is None else newline,
        eos,
    )


def _with_wanted(cfg: Experiment, wanted: dict[str, object]) -> Experiment:
    """The experiment with the explicit values beside its checkpoints.

    Raises:
      CheckpointError: the weights do not fit one of them.
    """
    shapes, sizes = None, flat(cfg)
    for name, value in wanted.items():
        section = name.split(".")[0]
        folder = (
            cfg.init_from
            if section == "fusion"
            else getattr(getattr(cfg, section, None), "checkpoint", "")
        )
        if not folder or sizes[name] == value or name.endswith(".checkpoint"):
            continue
        changed = with_fields(cfg, {name: value})
        check_values(changed)
        shapes = loaded_shapes(cfg) if shapes is None else shapes
        if not _fit(loaded_shapes(changed), shapes, cfg):
            raise CheckpointError(
                f"{name} {value} does not fit the weights of {section}.checkpoint {folder}, which have "
                f"{name} {sizes[name]}: leave it out."
            )
        cfg = changed
    return cfg


def loaded_shapes(cfg: Experiment) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of all parts that begin with a checkpoint."""
    return {
        path: shape
        for path, shape in shapes_of(cfg).items()
        if path.split("/")[0] in cfg.pretrained_parts
    }


def _fit(found: dict, stored: dict, cfg: Experiment) -> bool:
    """Whether parameters of these shapes can be made of the stored ones: positions are interpolated."""
    can_move = not cfg.vision.tile_layouts
    return found.keys() == stored.keys() and all(
        shape == stored[path] or (can_move and path == POSITIONS) for path, shape in found.items()
    )


def load_parts(cfg: Experiment, shapes: dict, mesh: Mesh) -> dict[str, jax.Array]:
    """Path -> parameter of the parts that begin with public checkpoints, each assembled where it lies; of no others.

    `shapes` is the tree of all parameters' shapes: each gets the dtype that stands there.
    """
    found, flat_shapes = {}, traverse_util.flatten_dict(shapes, sep="/")
    for part in cfg.pretrained_parts:
        if not is_run(getattr(cfg, part).checkpoint):
            found |= _read_part(cfg, part, flat_shapes, mesh)
    return found


def _read_part(cfg: Experiment, part: str, shapes: dict, mesh: Mesh) -> dict[str, jax.Array]:
    folder = getattr(cfg, part).checkpoint
    with open_tensors(folder) as tensors:
        checkpoint = inspect(folder, tensors)
        boxed = traverse_util.flatten_dict(
            abstract_params(_as_stored(cfg, checkpoint.cfg)), sep="/"
        )
        rows = _rows(checkpoint, cfg, part)
        filled = {piece.ours for row in rows for piece in row.parts}
        by_dtype = {}
        for path in (path for path in boxed if path in filled):
            by_dtype.setdefault(shapes[path].dtype, {})[path] = boxed[path]
        stored = checkpoint.stored(tensors)
        read = [
            read_params(rows, stored, wanted, dtype, mesh) for dtype, wanted in by_dtype.items()
        ]
        loaded = {path: x for params in read for path, x in params.items()}
    return with_positions(cfg, loaded, mesh)


def _as_stored(cfg: Experiment, stored: Config) -> Experiment:
    """The experiment with images of the size that the stored positions are for."""
    vision = stored if isinstance(stored, Vision) else stored.vision
    return replace(cfg, vision=replace(cfg.vision, image_size_px=vision.image_size_px))


def with_positions(
    cfg: Experiment, params: dict[str, jax.Array], mesh: Mesh
) -> dict[str, jax.Array]:
    """The parameters, with a table of positions for another image size interpolated to `cfg.vision.grid`."""
    table, (rows, columns) = params.get(POSITIONS), cfg.vision.grid
    if table is None or len(table) == rows * columns:
        return params
    side = round(len(table) ** 0.5)
    boxed = traverse_util.flatten_dict(abstract_params(cfg), sep="/")[POSITIONS]
    sharding = axes.parameter_shardings({POSITIONS: boxed}, mesh)[POSITIONS]
    resized = jax.jit(
        lambda x: resample_positions(x, (side, side), (rows, columns)).astype(x.dtype),
        out_shardings=sharding,
    )
    return params | {POSITIONS: resized(table)}


def _rows(checkpoint: Checkpoint, cfg: Experiment, part: str) -> list[Row]:
    """The rows of a part, for where it stands in the experiment."""
    if isinstance(checkpoint.cfg, Vision):
        return [
            replace(row, parts=tuple(replace(p, ours=f"vision/{p.ours}") for p in row.parts))
            for row in checkpoint.rows
        ]
    if part == "decoder":
        rows = checkpoint.family.rows(replace(checkpoint.cfg, fusion=cfg.fusion))
        rows = [
            row for row in rows if row.hub in checkpoint.stored_names
        ]  # a family may have cross-attention, too
    else:
        rows = checkpoint.rows
    return [row for row in rows if all(piece.ours.startswith(f"{part}/") for piece in row.parts)]


def processor_source(cfg: Experiment) -> Path | None:
    """The folder whose tokenizer and processor files a new run takes over; None where it begins with none."""
    folder = cfg.decoder.checkpoint
    if not folder:
        return None
    if not is_run(folder):
        return Path(folder).expanduser()
    processor = Workdir(folder).processor
    return processor if processor.is_dir() else None
