"""The supported families, by the `model_type` of their config.json."""

import os
from collections.abc import Mapping
from pathlib import Path

from vlm_jax.config import CheckpointError
from vlm_jax.hub.families.decoders import gemma, gpt2, llama, olmo2, phi3, smollm3
from vlm_jax.hub.families.encoders import (
    clip,
    dinov2,
    dinov3,
    mllama_vision,
    open_clip,
    siglip,
    siglip2,
    vit,
)
from vlm_jax.hub.families.family import Family, get_or
from vlm_jax.hub.families.multimodal import (
    encoder_decoder,
    fuyu,
    gemma3,
    idefics3,
    internvl,
    llava,
    llava_next,
    mistral3,
    mllama,
    paligemma,
    qwen2_vl,
    qwen3_vl,
)
from vlm_jax.hub.tensors.folder import existing_folder, read_json

KNOWN = (
    gpt2.GPT2,
    llama.LLAMA,
    llama.MISTRAL,
    llama.QWEN2,
    llama.QWEN3,
    olmo2.OLMO2,
    smollm3.SMOLLM3,
    phi3.PHI3,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    llava.LLAVA,
    llava_next.LLAVA_NEXT,
    llava_next.LLAVA_ONEVISION,
    paligemma.PALIGEMMA,
    gemma3.GEMMA3,
    idefics3.IDEFICS3,
    idefics3.SMOLVLM,
    internvl.INTERNVL,
    qwen2_vl.QWEN2_VL,
    qwen2_vl.QWEN2_5_VL,
    qwen3_vl.QWEN3_VL,
    fuyu.FUYU,
    mistral3.MISTRAL3,
    mllama.MLLAMA,
    vit.VIT,
    clip.CLIP,
    clip.CLIP_VISION,
    open_clip.OPEN_CLIP,
    siglip.SIGLIP,
    siglip.SIGLIP_VISION,
    siglip2.SIGLIP2,
    siglip2.SIGLIP2_VISION,
    dinov2.DINOV2,
    dinov3.DINOV3,
    encoder_decoder.ENCODER_DECODER,
)
FAMILIES = {family.model_type: family for family in KNOWN}


def config_path(folder: Path) -> Path:
    """Path of config.json or, in a folder that has only that, of OpenCLIP's config."""
    path = folder / "config.json"
    open_clip_path = folder / open_clip.OPEN_CLIP.config_file
    return open_clip_path if open_clip_path.is_file() and not path.is_file() else path


def find_family(config: Mapping, name: str, intermediate_layers: str | None = None) -> Family:
    """Returns the family of a config.json.

    Args:
      name: of the config, for messages.
      intermediate_layers: see `mllama.select_family`.

    Raises:
      CheckpointError: the family is not supported (the message lists the supported ones).
    """
    default = open_clip.OPEN_CLIP.model_type if "model_cfg" in config else None
    model_type = config.get("model_type", default)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{name}: model_type {model_type!r} is not supported "
            f"(choose from {', '.join(sorted(FAMILIES))})."
        )
    if FAMILIES[model_type] is mllama.MLLAMA:
        return mllama.select_family(config, intermediate_layers)
    return FAMILIES[model_type]


def possible_intermediate_layers(
    folder: str | os.PathLike, intermediate_layers: str | None
) -> tuple[str | None, ...]:
    """Returns the conventions to try for a folder: both, for a Llama 3.2 Vision that names none."""
    config = read_json(config_path(existing_folder(folder)))
    stated = intermediate_layers or get_or(config, "vision_config", {}).get(
        mllama_vision.INTERMEDIATE_LAYERS
    )
    return (
        ("input", "output")
        if config.get("model_type") == "mllama" and not stated
        else (intermediate_layers,)
    )
