"""Settings of images, encoder and projector that are refused together."""

import math

from vlm_jax.config import (
    PROJECTORS,
    ConfigError,
    Experiment,
)
from vlm_jax.config.checks.common import check_layers, is_changed
from vlm_jax.config.hints import either


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
    vision, projector = cfg.vision, cfg.projector
    if not vision.tile_grids:
        if vision.max_map_tiles is not None:
            raise ConfigError(
                f"vision.max_map_tiles {vision.max_map_tiles} has no effect without "
                "vision.tile_grids: leave it out."
            )
        return
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


def _patch_rope(cfg: Experiment) -> None:
    vision, rope = cfg.vision, cfg.vision.rope
    if rope.kind == "none":
        for name in ("theta", "coordinates"):
            if is_changed(rope, name):
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
    }
    missing = [setting for setting, is_met in needed.items() if not is_met]
    if missing:
        raise ConfigError(f"vision.deepstack_layers {layers} needs {missing[0]}: or leave it out.")
    blocks = cfg.fusion.sublayers(cfg.decoder.depth)
    crossing = sum("cross" in sublayers for sublayers in blocks)
    if cfg.fusion.image_in_memory and len(layers) >= crossing:
        raise ConfigError(
            f"vision.deepstack_layers {layers} needs a block of cross-attention each, and one more "
            f"that reads the encoder's output: fusion.kind {cfg.fusion.kind} has {crossing}."
        )
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
            if is_changed(vision, name):
                raise ConfigError(
                    f"vision.{name} {getattr(vision, name)} applies to images at native resolution "
                    "alone: set vision.max_patches, or leave it out."
                )
        if cfg.data.patches_per_row is not None:
            raise ConfigError(
                f"data.patches_per_row {cfg.data.patches_per_row} applies to images at native "
                "resolution alone: set vision.max_patches, or leave it out."
            )
        return
    others = {
        "kind": vision.has_encoder,
        "patch_embed": vision.patch_embed == "linear",
        "class_token": not vision.class_token,
        "registers": not vision.registers,
        "pool": vision.pool == "none",
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
    if not projector.spec.takes_native:
        kinds = either([kind for kind, spec in PROJECTORS.items() if spec.takes_native])
        raise ConfigError(
            f"projector.kind {projector.kind} does not take images at native resolution: leave out "
            f"vision.max_patches, choose {kinds}, or add native=True to its row of PROJECTORS."
        )
    if vision.newline_token and projector.spec.tokens == "queries":
        raise ConfigError(
            "vision.newline_token True separates rows of image tokens, which projector.kind "
            f"{projector.kind} does not emit: set it to False, or choose "
            f"{_projectors('all', 'squares')}."
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
    if cfg.squares_per_row < vision.max_squares:
        raise ConfigError(
            f"data.patches_per_row {cfg.data.patches_per_row} has no room for an image of "
            f"vision.max_patches {vision.max_patches} patches."
        )
    if cfg.fusion.has_blocks:
        raise ConfigError(
            f"fusion.prefix {cfg.fusion.prefix} needs images of one size: leave out "
            "vision.max_patches, or choose causal."
        )
    check_layers("vision.windowed_layers", vision.windowed_layers, vision.depth)
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
    if "heads" in projector.spec.fields and projector.head_dim is None:
        width = projector.block_width(cfg.vision, cfg.decoder.width)
        if width % projector.heads:
            owner = "decoder.width"
            if projector.keeps_width:
                owner = "the encoder's width"
            elif "width" in projector.spec.fields and projector.width is not None:
                owner = "projector.width"
            raise ConfigError(
                f"{owner} {width} is not a multiple of projector.heads {projector.heads}: choose "
                "other heads, or set projector.head_dim."
            )
    in_sequence = cfg.fusion.image_in_sequence
    if in_sequence and projector.keeps_width and cfg.vision.output_width != cfg.decoder.width:
        name = "kind" if projector.kind == "none" else "projection"
        raise ConfigError(
            f"projector.{name} none leaves image tokens in the encoder's width "
            f"{cfg.vision.output_width}, but with fusion.kind {cfg.fusion.kind} they need "
            f"decoder.width {cfg.decoder.width}: choose projector.{name} linear."
        )
    if projector.spec.tokens != "squares":
        return
    if projector.projection == "none":
        raise ConfigError(
            "projector.projection none is for projector.kind resampler, not for "
            f"{projector.kind}: choose linear or mlp."
        )
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


def _tiles(cfg: Experiment) -> None:
    vision, fusion, tags = cfg.vision, cfg.fusion, cfg.data.tag_ids
    is_cut = vision.cut_tiles > 1 or bool(vision.tile_grids)
    if fusion.splits_views and is_cut and not vision.thumbnail:
        raise ConfigError(
            f"vision.thumbnail False leaves fusion.kind {fusion.kind} without image tokens in the "
            "sequence for images of several tiles: set it to True, or vision.tiles to 1."
        )
    if fusion.tokens_without_image == "attend_all" and fusion.image_in_memory and is_cut:
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


CHECKS = (
    _tiled_encoder,
    _patch_rope,
    _native,
    _feature_layers,
    _deepstack,
    _resize,
    _projector,
    _tile_map,
    _tiles,
)
