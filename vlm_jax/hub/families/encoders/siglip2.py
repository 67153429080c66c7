"""SigLIP 2 NaFlex (Tschannen et al. 2025): SigLIP whose positions are resampled to every image.

Images have one square shape, or with `vision.max_patches` any. Checkpoints of SigLIP 2 with a fixed
resolution are of the family `siglip`. Source: transformers, models/siglip2/modeling_siglip2.py.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from vlm_jax.config import CheckpointError, Contrastive, Vision
from vlm_jax.hub.families.encoders import clip, siglip
from vlm_jax.hub.families.encoders.vit import side
from vlm_jax.hub.families.family import Family, Json, positive_int
from vlm_jax.hub.families.table import Row


def square(config: Json) -> Json:
    """Returns vision_config as SigLIP has it, with the image of which the positions are."""
    num_patches = positive_int(config, "num_patches", 256)
    rows = math.isqrt(num_patches)
    if rows**2 != num_patches:
        raise CheckpointError(
            f"config.json: num_patches {num_patches} is not supported: positions must be a square."
        )
    return config | {"image_size": rows * side(config, "patch_size", 16)}


def vision_only_from_hf(config: Json, names: Collection[str]) -> Vision:
    vision = siglip.vision_only_from_hf(square(config), names)
    return replace(vision, resample_positions="bilinear")


def vision_to_hf(vision: Vision) -> Json:
    config = siglip.vision_to_hf(vision)
    del config["image_size"]
    return config | {
        "model_type": "siglip2_vision_model",
        "num_patches": math.prod(vision.grid),
    }


def vision_only_to_hf(vision: Vision) -> Json:
    return {"architectures": ["Siglip2VisionModel"], **vision_to_hf(vision)}


def config_from_hf(config: Json, names: Collection[str]) -> Contrastive:
    vision = square(clip.tower_config(config, "vision"))
    cfg = siglip.config_from_hf(config | {"vision_config": vision}, names)
    return replace(cfg, vision=replace(cfg.vision, resample_positions="bilinear"))


def config_to_hf(cfg: Contrastive) -> Json:
    config = siglip.config_to_hf(cfg)
    return config | {
        "architectures": ["Siglip2Model"],
        "model_type": "siglip2",
        "text_config": config["text_config"] | {"model_type": "siglip2_text_model"},
        "vision_config": vision_to_hf(cfg.vision),
    }


def with_linear_patches(rows: Sequence[Row]) -> list[Row]:
    """Returns SigLIP's rows with the patch embedding as a linear layer."""
    changed = []
    for row in rows:
        if row.tensor.endswith("patch_embedding.weight"):
            target = replace(row.targets[0], pattern="D C -> C D", lengths=())
            row = replace(row, targets=(target,))
        changed.append(row)
    return changed


def param_table(cfg: Contrastive) -> list[Row]:
    return with_linear_patches(siglip.param_table(cfg))


def vision_only_table(vision: Vision) -> list[Row]:
    return with_linear_patches(siglip.vision_only_table(vision))


SIGLIP2 = Family("siglip2", config_from_hf, config_to_hf, param_table)
SIGLIP2_VISION = Family(
    "siglip2_vision_model",
    vision_only_from_hf,
    vision_only_to_hf,
    vision_only_table,
    clip.RENAMES_ALONE,
)
