"""The families that are known, by the `model_type` of their config.json."""

import os
from collections.abc import Mapping
from pathlib import Path

from vlm_jax.config import CheckpointError
from vlm_jax.hub.families import (
    clip,
    dinov2,
    encoder_decoder,
    fuyu,
    gemma,
    gpt2,
    llama,
    llava,
    mllama,
    mllama_vision,
    open_clip,
    paligemma,
    phi3,
    siglip,
    vit,
)
from vlm_jax.hub.families.family import Family, get_or
from vlm_jax.hub.tensors.folder import existing_folder, read_json

KNOWN = (
    gpt2.GPT2,
    llama.LLAMA,
    llama.MISTRAL,
    llama.QWEN2,
    phi3.PHI3,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    llava.LLAVA,
    paligemma.PALIGEMMA,
    fuyu.FUYU,
    mllama.MLLAMA,
    vit.VIT,
    clip.CLIP,
    clip.CLIP_VISION,
    open_clip.OPEN_CLIP,
    siglip.SIGLIP,
    siglip.SIGLIP_VISION,
    dinov2.DINOV2,
    encoder_decoder.ENCODER_DECODER,
)
FAMILIES = {family.model_type: family for family in KNOWN}


def config_path(folder: Path) -> Path:
    """config.json, or where there is none, OpenCLIP's."""
    path = folder / open_clip.OPEN_CLIP.config_file
    return (
        path
        if path.is_file() and not (folder / "config.json").is_file()
        else folder / "config.json"
    )


def family_of(config: Mapping, name: str, taps: str | None = None) -> Family:
    """The family of a config.json; `name` says whose it is, `taps` is of `mllama.family_of_taps`.

    Raises:
      CheckpointError: no known family (it lists those that are).
    """
    kind = config.get(
        "model_type", open_clip.OPEN_CLIP.model_type if "model_cfg" in config else None
    )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{name}: model_type {kind!r} is not supported: choose {', '.join(sorted(FAMILIES))}."
        )
    return mllama.family_of_taps(config, taps) if kind == "mllama" else FAMILIES[kind]


def possible_taps(folder: str | os.PathLike, taps: str | None) -> tuple[str | None, ...]:
    """The taps that outputs of a folder may have: both, where neither `taps` nor a Llama 3.2 Vision's config tells."""
    config = read_json(config_path(existing_folder(folder)))
    told = taps or get_or(config, "vision_config", {}).get(mllama_vision.TAPS)
    return ("input", "output") if config.get("model_type") == "mllama" and not told else (taps,)
