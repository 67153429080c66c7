"""Refuses an experiment that cannot work, with a sentence that names the fields and the way out."""

import dataclasses
import re
import typing

from vlm_jax.config import ConfigError, Contrastive, Experiment, Transformer, Vision
from vlm_jax.limits import check_numbers


def validate(cfg: Experiment) -> Experiment:
    """Returns the experiment as it came.

    Raises:
      ConfigError: a value, or two together, cannot work.
    """
    check_values(cfg)
    if not cfg.vision.checkpoint:  # public ones may leave pixels over at the border
        _patches(cfg.vision)
    for check in (_data, _drawn, _projector, _fusion, _tiles, _room, _rates, _microbatches, _profile):
        check(cfg)
    cfg.distributed.check()
    return cfg


def check_values(cfg: Experiment | Vision | Contrastive) -> None:
    """Raises ConfigError for a value that its field cannot have, or heads that do not fit the width; `validate` does.

    The sizes of a model alone, as a public checkpoint's config.json states them, are checked by this.
    """
    part = "vision." if isinstance(cfg, Vision) else ""
    check_types(cfg, part)
    values = flat(cfg, part)
    for path, kind in kinds(cfg, part).items():
        value, allowed = values[path], words(kind)
        wrong = [word for word in (value if isinstance(value, tuple) else (value,)) if allowed and word not in allowed]
        if wrong:
            raise ConfigError(f"{path} {wrong[0]!r} is no choice: choose {', '.join(allowed)}.")
    check_numbers({path.replace("text.", "decoder."): value for path, value in values.items()})
    if isinstance(cfg, Experiment):
        _heads(cfg.decoder, "decoder")
        _turns(cfg.decoder)
    if isinstance(cfg, Contrastive):
        _heads(cfg.text, "text")
    vision = cfg if isinstance(cfg, Vision) else cfg.vision
    if vision.kind == "vit":
        _heads(vision, "vision")
    else:
        _patches(vision)


def check_types(cfg, prefix: str = "") -> None:
    """Raises ConfigError for a value of another type than its field's: dataclasses take any."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        if not _fits(value, kind):
            raise ConfigError(f"{prefix}{name} is {value!r}: it must be {_called(kind)}.")
        if dataclasses.is_dataclass(kind):
            check_types(value, f"{prefix}{name}.")


def _fits(value, kind) -> bool:
    if typing.get_origin(kind) is tuple:
        of_each = typing.get_args(kind)
        if isinstance(value, tuple) and of_each[-1] is Ellipsis:
            of_each = of_each[:1] * len(value)
        return isinstance(value, tuple) and len(value) == len(of_each) and all(map(_fits, value, of_each))
    if kind in (int, float):
        return type(value) in (int, kind)  # True is no number
    return isinstance(value, str if words(kind) else kind)


def _called(kind) -> str:
    if typing.get_origin(kind) is tuple:
        of_each = typing.get_args(kind)
        number = "" if of_each[-1] is Ellipsis else f"{len(of_each)} "
        return f"a tuple of {number}{_called(of_each[0])}"
    return "str" if words(kind) else kind.__name__


def flat(cfg, prefix: str = "") -> dict[str, object]:
    """Nested dataclasses -> {"section.field": value}."""
    found = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        nested = dataclasses.is_dataclass(value)
        found |= flat(value, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": value}
    return found


def kinds(cfg, prefix: str = "") -> dict[str, object]:
    """Nested dataclasses -> {"section.field": type}."""
    found = {}
    for name, kind in typing.get_type_hints(type(cfg)).items():
        nested = dataclasses.is_dataclass(kind)
        found |= kinds(getattr(cfg, name), f"{prefix}{name}.") if nested else {prefix + name: kind}
    return found


def words(kind) -> tuple[str, ...]:
    """The words that a value of the type, or each of its values, may be; none where anything of its type may be."""
    return typing.get_args(element(kind))


def element(kind):
    """The type of one value: of each value of a tuple, or of the tuples in it."""
    while typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    return kind


def _patches(vision):
    size, patch = vision.image_size_px, vision.patch_size_px
    if size % patch:
        fitting = [p for p in range(1, size + 1) if size % p == 0]
        raise ConfigError(
            f"vision.image_size_px {size} is not a multiple of vision.patch_size_px {patch}: "
            f"patches of {', '.join(map(str, fitting))} px fit."
        )


def _heads(part: Transformer, name: str):
    if not part.head_dim and part.width % part.heads:
        raise ConfigError(f"{name}.width {part.width} is not a multiple of {name}.heads {part.heads}.")
    if part.heads % part.num_kv_heads:
        raise ConfigError(f"{name}.heads {part.heads} is not a multiple of {name}.kv_heads {part.kv_heads}.")


def _turns(decoder):
    if decoder.positions == "rope" and (decoder.turned % 2 or not 0 < decoder.turned <= decoder.head_width):
        raise ConfigError(
            f"decoder.rope.fraction {decoder.rope.fraction} of a head of {decoder.head_width} is {decoder.turned} "
            "numbers: RoPE turns an even number of them, from 2 to all."
        )


def _data(cfg):
    data = cfg.data
    if data.source == "conversations" and not data.files:
        raise ConfigError("data.source conversations needs data.files: JSON or JSONL files in LLaVA's format.")
    if data.source != "conversations" and (data.files or data.image_dir):
        unread = "data.files" if data.files else "data.image_dir"
        raise ConfigError(f"{unread} is of data.source conversations, not of {data.source}: leave it out.")
    if (data.is_conversations or data.is_drawn) and data.augment:
        raise ConfigError(
            f"data.augment {', '.join(data.augment)} would make what data.source {data.source} says about its images "
            "untrue: set it to nothing."
        )
    if not data.is_conversations and data.images_per_row > 1:
        raise ConfigError(
            f"data.images_per_row {data.images_per_row} is of conversations: with data.source {data.source} a row has "
            "one image."
        )
    if data.is_conversations and cfg.fusion.blind_rows == "read_all":
        raise ConfigError(
            f"fusion.blind_rows read_all lets a token without an image read those of other conversations in its row: "
            f"set it to skip for data.source {data.source}."
        )


def _drawn(cfg):
    data = cfg.data
    unread = [name for name in ("image_px", "images", "seed") if _is_changed(data, name)]
    if unread and not data.is_drawn:
        raise ConfigError(f"data.{unread[0]} is of data.source glyphs and digits, not of {data.source}: leave it out.")
    if min(data.images) < 1:
        raise ConfigError(
            f"data.images is {' '.join(map(str, data.images))}: train, validation and test need at least 1 image each."
        )


def _projector(cfg):
    projector, rows = cfg.projector, cfg.vision.grid[0]
    if projector.kind == "resampler" and cfg.decoder.width % projector.heads:
        raise ConfigError(f"decoder.width {cfg.decoder.width} is not a multiple of projector.heads {projector.heads}.")
    if projector.kind not in ("pixel_shuffle", "average_pool"):
        return
    if rows % projector.factor:
        raise ConfigError(
            f"projector.factor {projector.factor} does not divide the {rows} x {rows} patches of vision.image_size_px "
            f"{cfg.vision.image_size_px} and vision.patch_size_px {cfg.vision.patch_size_px}."
        )
    if cfg.vision.extra_tokens:
        raise ConfigError(
            f"projector.kind {projector.kind} needs a grid: set vision.keep_class_token to False, or choose "
            "linear, mlp or resampler."
        )


def _fusion(cfg):
    fusion = cfg.fusion
    if cfg.vision.newline_token and not fusion.image_in_sequence:
        raise ConfigError(
            f"vision.newline_token True stands in the token sequence, where fusion.kind {fusion.kind} puts no image: "
            "set it to False, or choose fusion.kind unified."
        )
    if fusion.image_in_memory and cfg.vision.kind == "none" and cfg.vision.positions == "none":
        raise ConfigError(
            f"vision.kind none with vision.positions none leaves fusion.kind {fusion.kind} no order of the patches: "
            "set vision.positions to learned or sincos, or choose fusion.kind unified."
        )
    unread = [name for name in ("cross_every", "cross_layers", "gated") if _is_changed(fusion, name)]
    if unread and not fusion.has_cross_blocks:
        raise ConfigError(
            f"fusion.{unread[0]} {getattr(fusion, unread[0])} is of fusion.kind cross_attention and hybrid: with "
            f"fusion.kind {fusion.kind} leave it out, or choose one of those."
        )
    if fusion.cross_layers and _is_changed(fusion, "cross_every"):
        raise ConfigError(
            f"fusion.cross_every {fusion.cross_every} and fusion.cross_layers {list(fusion.cross_layers)} both say "
            "where the cross blocks stand: leave one of them out."
        )
    outside = [i for i in fusion.cross_layers if not 0 <= i <= cfg.decoder.depth]
    if outside:
        raise ConfigError(
            f"fusion.cross_layers {outside} are not among the blocks 0 to {cfg.decoder.depth - 1} of decoder.depth "
            f"{cfg.decoder.depth}, nor {cfg.decoder.depth} (after the last)."
        )
    shared = cfg.data.questions_per_row > 1 and not cfg.data.is_conversations
    if fusion.prefix == "bidirectional" and shared:
        raise ConfigError(
            f"fusion.prefix bidirectional lets an image see its question, so data.questions_per_row "
            f"{cfg.data.questions_per_row} questions cannot share one: set it to 1, or fusion.prefix to causal."
        )


def _tiles(cfg):
    vision, fusion, tags = cfg.vision, cfg.fusion, cfg.data.tag_ids
    if fusion.kind == "hybrid" and vision.cut_tiles > 1 and not vision.thumbnail:
        raise ConfigError(
            "vision.thumbnail False leaves fusion.kind hybrid nothing to put into the sequence for an image in tiles: "
            "set it to True, or vision.tiles to 1."
        )
    if fusion.blind_rows == "read_all" and fusion.image_in_memory and vision.cut_tiles > 1:
        raise ConfigError(
            f"fusion.blind_rows read_all lets a token without a tile read those that are not there: set it to skip for "
            f"vision.tiles {vision.tiles}."
        )
    if tags and not cfg.tile_tags:
        raise ConfigError(
            f"data.tag_ids names the tags of tiles, of which there are none with vision.tiles {vision.tiles} and "
            f"vision.tile_tags {vision.tile_tags}: leave it out."
        )
    if tags and len(tags) != vision.views:
        raise ConfigError(
            f"data.tag_ids has {len(tags)} tags for the {vision.views} views of vision.tiles {vision.tiles}, the "
            "thumbnail among them: it must have one for each."
        )


def _is_changed(section, name: str) -> bool:
    return getattr(section, name) != getattr(type(section)(), name)


def _room(cfg):
    longest, image_slots = cfg.row_length, cfg.row_length - cfg.data.text_length
    tiles = f" (vision.tiles {cfg.vision.tiles})" if cfg.vision.cut_tiles > 1 else ""
    if longest > cfg.decoder.max_positions:
        raise ConfigError(
            f"decoder.max_positions {cfg.decoder.max_positions} has no room for the {image_slots} image "
            f"tokens of a row{tiles} and data.text_length {cfg.data.text_length}: it must be at least {longest}."
        )


def _rates(cfg):
    if not any(flat(cfg.optim.rate_scale).values()):
        raise ConfigError(f"optim.rate_scale is 0 for {', '.join(flat(cfg.optim.rate_scale))}: nothing would learn.")


def _microbatches(cfg):
    if cfg.train.batch_size % cfg.train.microbatches:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not divisible by train.microbatches {cfg.train.microbatches}."
        )


def _profile(cfg):
    wanted, steps = cfg.train.profile_steps, cfg.train.steps
    if wanted and not (re.fullmatch(r"[1-9][0-9]{0,8}:[1-9][0-9]{0,8}", wanted) and cfg.train.profiled):
        raise ConfigError(f"train.profile_steps {wanted!r} is no range of steps: write FIRST:LAST, such as 10:13.")
    if wanted and cfg.train.profiled[-1] > steps:
        raise ConfigError(f"train.profile_steps {wanted} ends after train.steps {steps}.")
