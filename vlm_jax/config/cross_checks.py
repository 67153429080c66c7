"""Combinations of settings that are refused, each in a sentence that names the fields."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from vlm_jax.config import (
    FUSION_STYLES,
    PROJECTORS,
    ConfigError,
    Experiment,
    Fusion,
    naming_source,
)
from vlm_jax.config.bounds import AT_LEAST, AT_MOST, check_path
from vlm_jax.config.datasets import (
    AUTO,
    CONVERSATION_FORMATS,
    restricted_fields,
    sources_that_read,
)
from vlm_jax.config.hints import either, nearest

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
NAME_CHARACTERS = "a name has letters, digits, '.', '_', '+' and '-'"
TRAINING = "train"  # prefix of the training's own metrics
LEAST_WEIGHT = 1e-6  # of a source of a mixture, relative to the largest


def _mixture(cfg: Experiment) -> None:
    """Checks names, weights and kinds of the sources; `validate` checks the data of each."""
    mixture, temperature = cfg.data.mixture, cfg.data.mixture_temperature
    if not mixture:
        if temperature is not None:
            raise ConfigError(
                f"data.mixture_temperature {temperature} has no effect without data.mixture: leave "
                "it out."
            )
        return
    names = [source.name for source in mixture]
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(f"data.mixture {name!r} is not a name: {NAME_CHARACTERS}.")
        if names.count(name) > 1:
            raise ConfigError(f"data.mixture names {name} twice: choose another name.")
    _weights(cfg)
    kinds = {}
    for source in mixture:
        with naming_source(source.name):
            dataset = cfg.data.part(source).dataset
        kinds.setdefault(dataset.conversations is None, source.name)
    if len(kinds) > 1:
        parts = cfg.data.parts
        raise ConfigError(
            f"data.mixture {kinds[True]} (data.source {parts[kinds[True]].source}) has rows of one "
            f"image with its questions, and {kinds[False]} (data.source "
            f"{parts[kinds[False]].source}) packed conversations: mix sources of one kind."
        )
    read = {name for part in cfg.data.parts.values() for name in part.dataset.fields}
    for name in sorted(restricted_fields() - read):
        if _is_changed(cfg.data, name):
            raise ConfigError(
                f"data.{name} applies only to data.source "
                f"{' and '.join(sources_that_read(name))}, which no source of data.mixture is: "
                "leave it out."
            )


def _weights(cfg: Experiment) -> None:
    weights = {source.name: source.weight for source in cfg.data.mixture}
    missing = [name for name, weight in weights.items() if weight is None]
    if len(missing) == len(weights):
        return
    if missing:
        raise ConfigError(
            f"data.mixture {missing[0]} has no weight, but other sources have: give every source a "
            "weight, or none of them (data.mixture_temperature)."
        )
    if cfg.data.mixture_temperature is not None:
        raise ConfigError(
            f"data.mixture_temperature {cfg.data.mixture_temperature} and the weights of "
            "data.mixture both set the shares of the sources: leave one out."
        )
    for name, weight in weights.items():
        if weight <= 0:
            raise ConfigError(f"data.mixture {name} has the weight {weight}: it must be above 0.")
        if weight < LEAST_WEIGHT * max(weights.values()):
            raise ConfigError(
                f"data.mixture {name} has the weight {weight}, less than a millionth of "
                f"{max(weights.values())}, the largest: leave the source out."
            )


def _data(cfg: Experiment) -> None:
    data, dataset = cfg.data, cfg.data.dataset
    if "files" not in dataset.fields and cfg.eval.files:
        raise ConfigError(_unread("eval.files", sources_that_read("files"), data.source))
    if data.mixture:
        return
    for name in (field.name for field in dataclasses.fields(data)):
        sources = sources_that_read(name)
        if sources and name not in dataset.fields and _is_changed(data, name):
            raise ConfigError(_unread(f"data.{name}", sources, data.source))
    if "files" not in dataset.fields and _is_changed(cfg.eval, "turns"):
        raise ConfigError(_unread("eval.turns", sources_that_read("files"), data.source))
    if "files" in dataset.fields and not data.files:
        raise ConfigError(
            f"data.source {data.source} needs data.files: conversations in one of the forms "
            f"{', '.join(CONVERSATION_FORMATS)}."
        )
    if data.format not in (AUTO, *CONVERSATION_FORMATS):
        raise ConfigError(
            f"data.format {data.format!r} is unknown{nearest(data.format, CONVERSATION_FORMATS)}: "
            f"choose one of {', '.join((AUTO, *CONVERSATION_FORMATS))}."
        )
    if data.augment and not dataset.allows_augment:
        raise ConfigError(
            f"data.augment {' '.join(data.augment)} would invalidate the answers of data.source "
            f"{data.source}: leave it empty."
        )
    if (
        data.is_conversations
        and cfg.fusion.tokens_without_image == "attend_all"
        and not cfg.vision.keeps_aspect_in_tiles
    ):
        raise ConfigError(
            "fusion.tokens_without_image attend_all leaks images between the conversations of a "
            f"row: set it to mask_out for data.source {data.source}."
        )


def _unread(field: str, sources: Sequence[str], source: str) -> str:
    return (
        f"{field} applies only to data.source {' and '.join(sources)}, not to {source}: "
        "leave it out."
    )


def _synthetic(cfg: Experiment) -> None:
    data = cfg.data
    if data.transcript and data.cell_px is None:
        raise ConfigError(
            "data.transcript True does not contain the sizes of words, which are asked for on "
            f"pages that are not typewritten: set data.cell_px to {AT_LEAST['data.cell_px']} to "
            f"{AT_MOST['data.cell_px']}, or data.transcript to False."
        )
    if min(data.images) < 1:
        raise ConfigError(
            f"data.images is {' '.join(map(str, data.images))}: train, validation and test need at "
            "least 1 image each."
        )


def _tokens(cfg: Experiment) -> None:
    data, vocab = cfg.data, cfg.decoder.vocab_size
    num_ids, tags = vocab + cfg.decoder.extra_tokens, sum(data.tag_ids, ())
    bos = () if data.bos_id is None else (data.bos_id,)
    for name, ids in (("special_ids", data.special_ids), ("tag_ids", tags), ("bos_id", bos)):
        outside = [i for i in ids if not 0 <= i < num_ids]
        if outside:
            extra = f" and decoder.extra_tokens {num_ids - vocab}" if num_ids > vocab else ""
            raise ConfigError(
                f"data.{name} {outside[0]} is not a token: choose ids of 0 to {num_ids - 1} "
                f"(decoder.vocab_size {vocab}{extra})."
            )
    if data.eos_id >= vocab:
        raise ConfigError(
            f"data.special_ids ends in {data.eos_id}, the end of text, which the decoder must be "
            f"able to generate: choose an id of 0 to {vocab - 1} (decoder.vocab_size {vocab})."
        )
    both = [i for i in tags if i in data.special_ids]
    if both:
        raise ConfigError(
            f"data.tag_ids {both[0]} is also in data.special_ids: choose ids without another "
            "meaning."
        )


def _tiled_encoder(cfg: Experiment) -> None:
    vision, layouts, projector = cfg.vision, cfg.vision.tile_layouts, cfg.projector
    if not layouts:
        return
    for name, needed in (
        ("kind", "vit"),
        ("class_token", True),
        ("keep_class_token", True),
        ("registers", 0),
    ):
        if getattr(vision, name) != needed:
            raise ConfigError(
                "vision.tile_layouts (the encoder of Llama 3.2 Vision) does not work with "
                f"vision.{name} {getattr(vision, name)}: set that to {needed}, or leave the "
                "layouts out."
            )
    if vision.num_global_layers < 1:
        raise ConfigError(
            "vision.tile_layouts needs vision.num_global_layers of at least 1, "
            f"not {vision.num_global_layers}."
        )
    if (1, 1) not in layouts:
        raise ConfigError("vision.tile_layouts must contain 1 1, the layout of training images.")
    wrong = [layout for layout in layouts if min(layout) < 1 or math.prod(layout) > vision.tiles]
    if wrong:
        raise ConfigError(
            f"vision.tile_layouts {' '.join(map(str, wrong[0]))} is not a valid layout: "
            f"rows times columns must be 1 to vision.tiles {vision.tiles}."
        )
    if projector.spec.tokens != "all":
        raise ConfigError(
            f"projector.kind {projector.kind} merges tokens of different vision.tile_layouts"
            f": choose {_projectors('all')}."
        )


def _tile_map(cfg: Experiment) -> None:
    vision, fusion, projector = cfg.vision, cfg.fusion, cfg.projector
    if not vision.tile_grids:
        if vision.max_map_tiles is not None:
            raise ConfigError(
                f"vision.max_map_tiles {vision.max_map_tiles} has no effect without "
                "vision.tile_grids: leave it out."
            )
        return
    if not fusion.image_in_sequence or fusion.image_in_memory:
        in_sequence = _styles(lambda style: style.image_in_sequence and not style.image_in_memory)
        raise ConfigError(
            "vision.tile_grids makes a map of tokens for the sequence, which fusion.kind "
            f"{fusion.kind} does not read whole: leave it out, or choose fusion.kind {in_sequence}."
        )
    for name, needed in (("tile_layouts", ()), ("newline_token", False)):
        if getattr(vision, name) != needed:
            raise ConfigError(
                f"vision.tile_grids does not work with vision.{name} {getattr(vision, name)}: "
                "leave one of them out."
            )
    wrong = [grid for grid in vision.tile_grids if min(grid) < 1 or math.prod(grid) > vision.tiles]
    if wrong:
        raise ConfigError(
            f"vision.tile_grids {' '.join(map(str, wrong[0]))} is not a valid grid: rows times "
            f"columns must be 1 to vision.tiles {vision.tiles}."
        )
    if projector.spec.tokens == "queries" or vision.extra_tokens:
        raise ConfigError(
            "vision.tile_grids needs a grid of projected tokens: set vision.keep_class_token to "
            f"False, and projector.kind to {_projectors('all', 'squares')}."
        )
    turns = any("turn" in part.augment for part in cfg.data.parts.values())
    if turns and {(columns, rows) for rows, columns in vision.tile_grids} != set(vision.tile_grids):
        raise ConfigError(
            "data.augment turn turns images to grids that are not in vision.tile_grids: leave it "
            "out, or add the grids with rows and columns exchanged."
        )


def _projectors(*tokens: str) -> str:
    """Lists the projectors that emit such tokens, for a message."""
    return either([kind for kind, spec in PROJECTORS.items() if spec.tokens in tokens])


def _styles(accepts: Callable[[Fusion], bool]) -> str:
    """Lists the fusion styles that `accepts` returns True for, for a message."""
    return either([kind for kind in FUSION_STYLES if accepts(Fusion(kind))])


def _patch_rope(cfg: Experiment) -> None:
    vision, rope = cfg.vision, cfg.vision.rope
    if rope.kind == "none":
        for name in ("theta", "coordinates"):
            if _is_changed(rope, name):
                raise ConfigError(
                    f"vision.rope.{name} {getattr(rope, name)} has no effect with vision.rope.kind "
                    "none: set that to same or alternate, or leave it out."
                )
    elif vision.tile_layouts or not vision.has_encoder:
        setting = "tile_layouts" if vision.tile_layouts else "kind none"
        raise ConfigError(
            f"vision.rope.kind {rope.kind} has no effect with vision.{setting}: leave one out."
        )


def _deepstack(cfg: Experiment) -> None:
    vision, layers = cfg.vision, cfg.vision.deepstack_layers
    if not layers:
        return
    outside = [layer for layer in layers if not 1 <= layer <= vision.depth]
    if outside:
        raise ConfigError(
            f"vision.deepstack_layers {outside[0]} is not a block of an encoder of vision.depth "
            f"{vision.depth}: choose 1 to {vision.depth}."
        )
    needed = {
        "vision.max_patches": vision.is_native,
        "vision.feature_layers ()": not vision.feature_layers,
        "projector.kind pixel_shuffle": cfg.projector.kind == "pixel_shuffle",
        "fusion.kind unified": cfg.fusion.image_in_sequence and not cfg.fusion.image_in_memory,
    }
    missing = [setting for setting, is_met in needed.items() if not is_met]
    if missing:
        raise ConfigError(f"vision.deepstack_layers {layers} needs {missing[0]}: or leave it out.")
    if len(layers) > cfg.decoder.depth:
        raise ConfigError(
            f"vision.deepstack_layers {layers} needs a block of the decoder each: decoder.depth "
            f"{cfg.decoder.depth} is too small."
        )


def _native(cfg: Experiment) -> None:
    """Checks the settings of images at native resolution, and those that need it."""
    vision, projector = cfg.vision, cfg.projector
    if not vision.is_native:
        for name in ("patch_square", "patch_frames", "window_patches", "windowed_layers"):
            if _is_changed(vision, name):
                raise ConfigError(
                    f"vision.{name} {getattr(vision, name)} applies to images at native resolution "
                    "alone: set vision.max_patches, or leave it out."
                )
        return
    others = {
        "kind": vision.has_encoder,
        "patch_embed": vision.patch_embed == "linear",
        "class_token": not vision.class_token,
        "registers": not vision.registers,
        "pool": vision.pool == "none",
        "newline_token": not vision.newline_token,
        "tiles": vision.tiles == 1,
        "tile_layouts": not vision.tile_layouts,
        "tile_grids": not vision.tile_grids,
        "resize": vision.resize == "squash",
    }
    for name, is_possible in others.items():
        if not is_possible:
            raise ConfigError(
                f"vision.{name} {getattr(vision, name)} is not possible at native resolution: "
                "leave out vision.max_patches, or choose another value."
            )
    if projector.spec.tokens == "queries":
        raise ConfigError(
            f"projector.kind {projector.kind} needs images of one size: leave out "
            f"vision.max_patches, or choose {_projectors('all', 'squares')}."
        )
    if vision.patch_square != projector.merged_side:
        raise ConfigError(
            f"vision.patch_square {vision.patch_square} must be the side of the squares of patches "
            f"that projector.kind {projector.kind} makes a token of: set it to "
            f"{projector.merged_side}."
        )
    if not vision.max_squares:
        raise ConfigError(
            f"vision.max_patches {vision.max_patches} is less than a square of vision.patch_square "
            f"{vision.patch_square} x {vision.patch_square} patches."
        )
    if cfg.fusion.has_blocks:
        raise ConfigError(
            f"fusion.prefix {cfg.fusion.prefix} needs images of one size: leave out "
            "vision.max_patches, or choose causal."
        )
    _check_layers("vision.windowed_layers", vision.windowed_layers, vision.depth)
    if bool(vision.windowed_layers) != (vision.window_patches is not None):
        raise ConfigError(
            "vision.windowed_layers and vision.window_patches need one another: set both, or leave "
            "both out."
        )


def _feature_layers(cfg: Experiment) -> None:
    vision = cfg.vision
    outside = [i for i in vision.feature_layers if not -vision.depth - 1 <= i <= vision.depth]
    if outside:
        raise ConfigError(
            f"vision.feature_layers {outside[0]} is not a hidden state of an encoder of "
            f"vision.depth {vision.depth}: choose {-vision.depth - 1} to {vision.depth}."
        )


def _resize(cfg: Experiment) -> None:
    vision = cfg.vision
    fits_tiles = vision.resize == "pad" and vision.tile_grids
    if vision.resize != "squash" and vision.cut_tiles > 1 and not fits_tiles:
        raise ConfigError(
            f"vision.resize {vision.resize} makes one square of an image, but vision.tiles "
            f"{vision.tiles} splits it into several: set it to squash, or vision.tiles to 1."
        )
    crops = vision.resize == "crop" and vision.shortest_edge_px >= vision.image_size_px
    if vision.resize_px is not None and not crops:
        raise ConfigError(
            f"vision.resize_px {vision.resize_px} is the shorter side of an image before the crop: "
            "it needs vision.resize crop, and at least vision.image_size_px "
            f"{vision.image_size_px}."
        )


def _projector(cfg: Experiment) -> None:
    projector, rows = cfg.projector, cfg.vision.grid[0]
    if "heads" in projector.spec.fields and cfg.decoder.width % projector.heads:
        raise ConfigError(
            f"decoder.width {cfg.decoder.width} is not a multiple of "
            f"projector.heads {projector.heads}."
        )
    if projector.spec.tokens != "squares":
        return
    if rows % projector.factor and not cfg.vision.is_native:
        raise ConfigError(
            f"projector.factor {projector.factor} does not divide the {rows} x {rows} patches of "
            f"vision.image_size_px {cfg.vision.image_size_px} and vision.patch_size_px "
            f"{cfg.vision.patch_size_px}."
        )
    if cfg.vision.extra_tokens:
        raise ConfigError(
            f"projector.kind {projector.kind} needs a grid: set vision.keep_class_token to False, "
            f"or choose {_projectors('all', 'queries')}."
        )


def _fusion(cfg: Experiment) -> None:
    fusion = cfg.fusion
    if cfg.vision.newline_token and not fusion.image_in_sequence:
        raise ConfigError(
            "vision.newline_token True needs image tokens in the sequence, which fusion.kind "
            f"{fusion.kind} does not have: set it to False, or choose fusion.kind "
            f"{_styles(lambda style: style.image_in_sequence)}."
        )
    if fusion.image_in_memory and not cfg.vision.has_encoder and cfg.vision.positions == "none":
        raise ConfigError(
            "vision.kind none with vision.positions none gives patches no positions in the "
            f"cross-attention of fusion.kind {fusion.kind}: set vision.positions to learned or "
            "sincos, or choose fusion.kind unified."
        )
    if fusion.placeholder and (fusion.image_in_sequence or not fusion.image_in_memory):
        raise ConfigError(
            "fusion.placeholder True marks images that are only in cross-attention, which "
            f"fusion.kind {fusion.kind} does not have: leave it out, or choose fusion.kind "
            f"{_styles(lambda style: style.image_in_memory and not style.image_in_sequence)}."
        )
    if cfg.vision.keeps_aspect_in_tiles and fusion.image_in_sequence:
        raise ConfigError(
            "vision.resize pad with vision.tile_layouts works only with cross-attention, not with "
            f"fusion.kind {fusion.kind}: set it to squash."
        )
    if fusion.has_image_blocks and not fusion.image_in_sequence:
        raise ConfigError(
            "fusion.prefix bidirectional_images needs image tokens in the sequence, which "
            f"fusion.kind {fusion.kind} does not have: set it to causal, or choose fusion.kind "
            f"{_styles(lambda style: style.image_in_sequence)}."
        )
    unused = [name for name in fusion.unused if _is_changed(fusion, name)]
    if unused:
        name = unused[0]
        raise ConfigError(
            f"fusion.{name} {getattr(fusion, name)} has no effect with fusion.kind {fusion.kind}: "
            "leave it out, or choose fusion.kind "
            f"{_styles(lambda style: name not in style.unused)}."
        )
    if fusion.cross_layers and _is_changed(fusion, "cross_every"):
        raise ConfigError(
            f"fusion.cross_every {fusion.cross_every} and fusion.cross_layers "
            f"{list(fusion.cross_layers)} both place the cross-attention blocks: leave one out."
        )
    outside = [i for i in fusion.cross_layers if not 0 <= i <= cfg.decoder.depth]
    if outside:
        raise ConfigError(
            f"fusion.cross_layers {outside} are not blocks of a decoder of decoder.depth "
            f"{cfg.decoder.depth}: choose 0 to {cfg.decoder.depth} (after the last)."
        )
    shared = cfg.data.questions_per_row > 1 and not cfg.data.is_conversations
    if fusion.is_prefix_lm and shared:
        raise ConfigError(
            "fusion.prefix bidirectional lets an image attend to its question, so "
            f"data.questions_per_row {cfg.data.questions_per_row} questions cannot share an image: "
            "set it to 1, or fusion.prefix to causal."
        )


def _tiles(cfg: Experiment) -> None:
    vision, fusion, tags = cfg.vision, cfg.fusion, cfg.data.tag_ids
    if fusion.splits_views and vision.cut_tiles > 1 and not vision.thumbnail:
        raise ConfigError(
            f"vision.thumbnail False leaves fusion.kind {fusion.kind} without image tokens in the "
            "sequence for images of several tiles: set it to True, or vision.tiles to 1."
        )
    if (
        fusion.tokens_without_image == "attend_all"
        and fusion.image_in_memory
        and vision.cut_tiles > 1
    ):
        raise ConfigError(
            "fusion.tokens_without_image attend_all attends to tiles of padding: set it to "
            f"mask_out for vision.tiles {vision.tiles}."
        )
    if tags and not cfg.tile_tags:
        raise ConfigError(
            f"data.tag_ids needs tile tags, which vision.tiles {vision.tiles} and vision.tile_tags "
            f"{vision.tile_tags} do not give: leave it out."
        )
    if tags and len(tags) != vision.views:
        raise ConfigError(
            f"data.tag_ids has {len(tags)} tags for the {vision.views} views of vision.tiles "
            f"{vision.tiles}, thumbnail included: it must have one for each."
        )


def _is_changed(section, name: str) -> bool:
    return getattr(section, name) != getattr(type(section)(), name)


def _room(cfg: Experiment) -> None:
    image_tokens = cfg.row_length - cfg.data.text_length
    tiles = f" (vision.tiles {cfg.vision.tiles})" if cfg.vision.cut_tiles > 1 else ""
    if cfg.row_length > cfg.decoder.max_positions:
        raise ConfigError(
            f"decoder.max_positions {cfg.decoder.max_positions} has no room for the {image_tokens} "
            f"image tokens of a row{tiles} and data.text_length {cfg.data.text_length}: it must be "
            f"at least {cfg.row_length}."
        )


def _parts(cfg: Experiment) -> list[str]:
    """Returns the parts of the model that have parameters."""
    vision, fusion = cfg.vision, cfg.fusion
    has_part = {
        "vision": fusion.has_images and (vision.has_encoder or vision.positions == "learned"),
        "projector": fusion.has_images and cfg.projector.kind != "none",
        "decoder": True,
        "cross_attention": fusion.image_in_memory,
    }
    return [part for part, is_present in has_part.items() if is_present]


def _rates(cfg: Experiment) -> None:
    parts = _parts(cfg)
    if not any(getattr(cfg.optim.lr_mult, part) for part in parts):
        raise ConfigError(
            f"optim.lr_mult is 0 for {', '.join(parts)}, all parts of the model: nothing would be "
            "trained."
        )


def _lora(cfg: Experiment) -> None:
    lora = cfg.lora
    if cfg.adapter and (not cfg.init_from or cfg.init_parts):
        raise ConfigError(
            f"adapter {cfg.adapter} needs its whole base model: set init_from to its folder, and "
            "leave init_parts out."
        )
    if lora.rank is None:
        for field in dataclasses.fields(lora):
            if _is_changed(lora, field.name):
                raise ConfigError(
                    f"lora.{field.name} has no effect without lora.rank: set lora.rank, or leave "
                    f"lora.{field.name} out."
                )
    elif not lora.targets:
        raise ConfigError("lora.rank needs lora.targets, such as decoder: it is empty.")
    for target in lora.parsed_targets:
        part = target.name.split(".")[0]
        if getattr(cfg.optim.lr_mult, part, None) == 0:
            raise ConfigError(
                f"optim.lr_mult.{part} 0 trains no adapter of lora.targets {target.name}: set it "
                "above 0; the kernels stay frozen."
            )


def _frozen(cfg: Experiment) -> None:
    is_any_frozen = not all(getattr(cfg.optim.lr_mult, part) for part in _parts(cfg))
    if cfg.train.frozen_dtype is not None and cfg.lora.rank is None and not is_any_frozen:
        raise ConfigError(
            f"train.frozen_dtype {cfg.train.frozen_dtype} has no effect, because all parts are "
            "trained: set lora.rank, or optim.lr_mult.PART to 0, or leave it out."
        )


def _sliding(cfg: Experiment) -> None:
    window, layers, depth = (
        cfg.decoder.sliding_window,
        cfg.decoder.sliding_layers,
        cfg.decoder.depth,
    )
    if layers and window is None:
        raise ConfigError(
            "decoder.sliding_layers needs decoder.sliding_window, the number of tokens that a "
            "token attends to."
        )
    if window is not None and not layers:
        raise ConfigError(
            f"decoder.sliding_window {window} applies to decoder.sliding_layers alone: list "
            "layers, or leave it out."
        )
    _check_layers("decoder.sliding_layers", layers, depth)


def _rope_sections(cfg: Experiment) -> None:
    decoder, sections = cfg.decoder, cfg.decoder.rope.sections
    if not sections:
        if decoder.rope.interleaved:
            raise ConfigError(
                "decoder.rope.interleaved True has no effect without decoder.rope.sections: leave "
                "it out."
            )
        return
    if decoder.positions != "rope" or decoder.rope.scaling != "none":
        setting = "positions" if decoder.positions != "rope" else "rope.scaling"
        raise ConfigError(
            f"decoder.rope.sections has no effect with decoder.{setting} other than "
            f"{'rope' if setting == 'positions' else 'none'}: leave one out."
        )
    if len(sections) != 3 or sum(sections) != decoder.rotary_dim // 2:
        raise ConfigError(
            f"decoder.rope.sections {sections} must be three numbers of frequencies, for time, row "
            f"and column, with the sum {decoder.rotary_dim // 2}, half of the rotated dimensions."
        )
    if cfg.vision.tile_grids:
        raise ConfigError(
            "decoder.rope.sections need images on one grid of tokens: leave out vision.tile_grids."
        )


def _no_rope(cfg: Experiment) -> None:
    layers, positions = cfg.decoder.no_rope_layers, cfg.decoder.positions
    if layers and positions != "rope":
        raise ConfigError(
            f"decoder.no_rope_layers has no effect with decoder.positions {positions}: set it to "
            "rope, or leave decoder.no_rope_layers out."
        )
    _check_layers("decoder.no_rope_layers", layers, cfg.decoder.depth)


def _check_layers(field: str, layers: tuple[int, ...], depth: int) -> None:
    """Raises ConfigError if a field names a block that the decoder does not have."""
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise ConfigError(f"{field} names layer {outside[0]}: choose from 0 to {depth - 1}.")


def _microbatches(cfg: Experiment) -> None:
    if cfg.train.batch_size % cfg.train.microbatches:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not divisible by "
            f"train.microbatches {cfg.train.microbatches}."
        )


def _profile(cfg: Experiment) -> None:
    profile, steps = cfg.train.profile_steps, cfg.train.steps
    if not profile:
        return
    is_range = re.fullmatch(r"[1-9][0-9]{0,8}:[1-9][0-9]{0,8}", profile)
    if not is_range or not cfg.train.profiled:
        raise ConfigError(
            f"train.profile_steps {profile!r} is not a range of steps: write FIRST:LAST, "
            "such as 10:13."
        )
    if cfg.train.profiled[-1] > steps:
        raise ConfigError(f"train.profile_steps {profile} ends after train.steps {steps}.")


def _validation(cfg: Experiment) -> None:
    """Checks the fields of validation; `infer/metrics/scores.py` checks train.best_metric."""
    entries, every_steps = cfg.eval.splits, cfg.eval.every_steps
    if every_steps is None:
        for name in ("eval.splits", "train.best_metric", "train.patience"):
            section, _, field = name.partition(".")
            value = getattr(getattr(cfg, section), field)
            if value not in (None, ()):
                raise ConfigError(
                    f"{name} has no effect without validation: set eval.every_steps, or leave "
                    f"{name} out."
                )
        return
    if not entries:
        raise ConfigError(
            f"eval.every_steps {every_steps} needs a split to validate on: set eval.splits, such "
            "as val=train[90%:] with data.train_split train[:90%]."
        )
    names = [entry.partition("=")[0] for entry in entries]
    for name, entry in zip(names, entries, strict=True):
        if not NAME.fullmatch(name) or entry.endswith("="):
            raise ConfigError(
                f"eval.splits {entry!r} is not NAME=SPLIT, such as val=train[90%:]: "
                f"{NAME_CHARACTERS}."
            )
        if name == TRAINING:
            raise ConfigError(
                f"eval.splits {entry!r} has the name of the training's own metrics: choose another "
                f"name, such as train_part={entry.partition('=')[2] or entry}."
            )
        if names.count(name) > 1:
            raise ConfigError(f"eval.splits names {name} twice: choose another name.")
    if "files" in cfg.data.dataset.fields:
        for split in cfg.eval.named_splits.values():
            check_path("eval.splits", split)


CHECKS = (
    *(_mixture, _data, _synthetic, _tokens, _tiled_encoder, _patch_rope, _native, _feature_layers),
    _deepstack,
    *(_resize, _projector, _tile_map, _fusion, _tiles, _room, _rates, _lora, _frozen, _sliding),
    *(_no_rope, _rope_sections, _microbatches, _profile, _validation),
)
