"""LLaVA-NeXT (1.6) and LLaVA-OneVision: LLaVA with a map of tiles (`vision.tile_grids`).

Liu et al. 2024 (LLaVA-NeXT: Improved reasoning, OCR, and world knowledge); Li et al. 2024
(LLaVA-OneVision: Easy visual task transfer, section 3).
"""

import math
import re
from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import CheckpointError, Experiment, Fusion, Projector
from vlm_jax.config.bounds import check_number
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.family import ACTIVATIONS, Family, HfProcessor, Json, get_or, lookup
from vlm_jax.hub.families.multimodal import llava
from vlm_jax.hub.families.table import Row, row

PINPOINTS, ASPECT = "image_grid_pinpoints", "vision_aspect_ratio"
NEWLINE = row("image_newline", "projector/newline")
SIDES_PX = range(384, 2305, 384)
NEXT_DEFAULTS = {  # of LlavaNextConfig
    "vision_config": {"model_type": "clip_vision_model"},
    "text_config": {"model_type": "llama"},
    PINPOINTS: [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
ONEVISION_DEFAULTS = {  # of LlavaOnevisionConfig
    "vision_config": {"model_type": "siglip_vision_model"},
    "text_config": {"model_type": "qwen2"},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    PINPOINTS: [[height, width] for height in SIDES_PX for width in SIDES_PX],
    ASPECT: "anyres_max_9",
}


def read_grids(config: Json, side_px: int) -> tuple[tuple[int, int], ...]:
    """Reads the sizes of an image as (rows, columns) of tiles.

    Raises:
      CheckpointError: a size is not a whole number of tiles.
    """
    grids = []
    pinpoints = config[PINPOINTS]
    for size in pinpoints if isinstance(pinpoints, list) else [pinpoints]:
        is_pair = isinstance(size, list | tuple) and len(size) == 2
        if not is_pair or not all(type(px) is int and px > 0 and px % side_px == 0 for px in size):
            raise CheckpointError(
                f"config.json: {PINPOINTS} {size!r} is not supported: it must be a height and a "
                f"width in whole tiles of {side_px} px."
            )
        grids.append((size[0] // side_px, size[1] // side_px))
    if not grids:
        raise CheckpointError(f"config.json: {PINPOINTS} is empty: an image has no size.")
    return tuple(grids)


def read_max_map_tiles(config: Json) -> int | None:
    """Reads the number of tiles above which a map is resized; None: any map is kept."""
    aspect = config.get(ASPECT)
    if aspect is None:
        return None
    match = re.fullmatch(r"anyres_max_(\d{1,4})", str(aspect))
    if match is None:
        raise CheckpointError(
            f"config.json: {ASPECT} {aspect!r} is not supported, only 'anyres_max_N'."
        )
    return int(match[1])


def family(
    model_type: str, name: str, defaults: Json, image_token: int, processor: HfProcessor
) -> Family:
    """Builds the family with the model class of transformers that begins with `name`."""

    def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
        config = defaults | llama.drop_nulls(config)
        vision = llava.tower_from_hf(config)
        if vision.keep_class_token:
            raise CheckpointError(
                "config.json: vision_feature_select_strategy 'full' keeps the class token of the "
                "encoder, which has no place in the map of an image: only 'default' is supported."
            )
        grids = read_grids(config, vision.image_size_px)
        tiles = max(map(math.prod, grids))
        check_number("vision.tiles", tiles)
        return Experiment(
            vision=replace(
                vision,
                resize="pad",
                tiles=tiles,
                tile_grids=grids,
                max_map_tiles=read_max_map_tiles(config),
            ),
            projector=Projector(
                "mlp",
                activation=lookup(config, "projector_hidden_act", ACTIVATIONS, "gelu"),
                bias=get_or(config, "multimodal_projector_bias", True),
            ),
            fusion=Fusion("unified"),
            decoder=llava.text_from_hf(config, names, llava.TEXTS, "llama"),
        )

    def config_to_hf(cfg: Experiment) -> Json:
        vision = cfg.vision
        side = vision.image_size_px
        pinpoints = [[rows * side, columns * side] for rows, columns in vision.tile_grids]
        config = llava.config_to_hf(cfg) | {
            "architectures": [f"{name}ForConditionalGeneration"],
            "model_type": model_type,
            PINPOINTS: pinpoints,
        }
        if ASPECT in defaults:
            config[ASPECT] = f"anyres_max_{vision.max_map_tiles}"
        return config

    return Family(
        model_type,
        config_from_hf,
        config_to_hf,
        param_table,
        llava.RENAMES,
        image_token=image_token,
        processor=processor,
        module_names=MODULE_NAMES,
    )


def param_table(cfg: Experiment) -> list[Row]:
    return [*llava.param_table(cfg), NEWLINE]


MODULE_NAMES = (*llava.MODULE_NAMES, (r"^image_newline$", "model.image_newline"))
LLAVA_NEXT = family(
    "llava_next",
    "LlavaNext",
    NEXT_DEFAULTS,
    image_token=32000,
    processor=HfProcessor(
        "LlavaNextProcessor",
        resize="pad",
        counts_patches=True,
        image_processor="LlavaNextImageProcessor",
    ),
)
LLAVA_ONEVISION = family(
    "llava_onevision",
    "LlavaOnevision",
    ONEVISION_DEFAULTS,
    image_token=151646,
    processor=HfProcessor(
        "LlavaOnevisionProcessor",
        resize="pad",
        counts_image_tokens=True,
        token_count_key="num_image_tokens",
        image_processor="LlavaOnevisionImageProcessor",
    ),
)
