"""Image preprocessing settings of a checkpoint folder."""

import os
from pathlib import Path
from typing import Any

from vlm_jax.config import CheckpointError
from vlm_jax.hub.images.checks import (
    check_together,
    check_value,
    parse_channels,
    parse_pair,
    parse_size,
    pixel_limits,
    refusal,
)
from vlm_jax.hub.images.defaults import (
    BICUBIC,
    BILINEAR,
    CLASS_OF_MODEL_TYPE,
    CLIP_MEAN,
    CLIP_STD,
    DEFAULTS,
)
from vlm_jax.hub.images.settings import OPEN_CLIP, PIXTRAL, QWEN2_VL, ImageSettings
from vlm_jax.hub.tensors.folder import read_json

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
OPEN_CLIP_RESIZES = ("shortest", "squash")
# "random" applies to training only.
OPEN_CLIP_FILTERS = {"bicubic": BICUBIC, "bilinear": BILINEAR, "random": BICUBIC}


def read_settings(folder: str | os.PathLike) -> ImageSettings:
    """Reads the settings of transformers' files, else of OpenCLIP's.

    Raises:
      CheckpointError: none of the files exists, the file is not JSON, its processor is not one of
        `DEFAULTS`, or a value is invalid.
    """
    folder = Path(os.path.expanduser(folder))
    # transformers 5 writes a whole processor to this file; 4 never wrote the image part.
    if os.path.isfile(folder / PROCESSOR):
        values = read_json(folder / PROCESSOR).get("image_processor")
        if values is not None:
            return _from_transformers(folder / PROCESSOR, values)
    if os.path.isfile(folder / PREPROCESSOR):
        return _from_transformers(folder / PREPROCESSOR, read_json(folder / PREPROCESSOR))
    if os.path.isfile(folder / OPEN_CLIP):
        return _from_open_clip(folder / OPEN_CLIP, read_json(folder / OPEN_CLIP))
    raise CheckpointError(
        f"{folder} has no image preprocessing config: add {PREPROCESSOR}, {PROCESSOR} with an "
        f"image_processor, or {OPEN_CLIP}."
    )


def _from_transformers(path: Path, values: dict) -> ImageSettings:
    if not isinstance(values, dict):
        raise refusal(path, "image_processor", values, "an object")
    kind = _processor_class(path, values)
    if kind == PIXTRAL:
        values = values | _pixtral_patches(path.with_name(PROCESSOR))
    values = {key: x for key, x in values.items() if x is not None}
    if kind == "IdeficsImageProcessor" and "image_size" in values:
        values["size"] = values["image_size"]
    settings = DEFAULTS[kind] | values
    settings = {key: check_value(path, key, x) for key, x in settings.items()}
    if kind == "Gemma3ImageProcessor" and settings.get("do_pan_and_scan"):
        raise refusal(path, "do_pan_and_scan", True, "false: crops of an image are not supported")
    default_to_square = settings.get("default_to_square", True)
    if kind == QWEN2_VL:
        settings["size"] = pixel_limits(path, settings)
    else:
        settings["size"] = parse_size(path, "size", settings["size"], default_to_square)
    fields = {key: x for key, x in settings.items() if key in ImageSettings.__dataclass_fields__}
    image_settings = ImageSettings(**fields | {"kind": kind})
    check_together(path, image_settings)
    return image_settings


def _pixtral_patches(path: Path) -> dict[str, Any]:
    """Patches of an image, for which Pixtral's processor overrides its image processor."""
    processor = read_json(path) if os.path.isfile(path) else {}
    keys = {"patch_size": "patch_size", "spatial_merge_size": "merge_size"}
    return {keys[key]: x for key, x in processor.items() if key in keys and x is not None}


def _processor_class(path: Path, values: dict) -> str:
    name = values.get("image_processor_type")
    if name is None:
        name = values.get("feature_extractor_type")  # before transformers 4.26
    model_config = path.with_name("config.json")
    if name is None and os.path.isfile(model_config):
        name = CLASS_OF_MODEL_TYPE.get(str(read_json(model_config).get("model_type")))
    known = str(name).replace("FeatureExtractor", "ImageProcessor")
    known = known.removesuffix("Fast").removesuffix("Pil")
    if known not in DEFAULTS:
        raise refusal(path, "image_processor_type", name, f"one of {', '.join(DEFAULTS)}")
    return known


def _from_open_clip(path: Path, config: dict) -> ImageSettings:
    """OpenCLIP's `preprocess_cfg` for inference, with the model's image size.

    Reference: `open_clip.transform.image_transform`.
    """
    try:
        size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
        values = config.get("preprocess_cfg", {}).items()
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} has no model_cfg with a vision_cfg, or its preprocess_cfg is not an object."
        ) from None
    values = {key: x for key, x in values if x is not None}
    mode = values.get("resize_mode", "shortest")
    interpolation = values.get("interpolation", "bicubic")
    if mode not in OPEN_CLIP_RESIZES:
        raise refusal(path, "resize_mode", mode, f"one of {', '.join(OPEN_CLIP_RESIZES)}")
    if str(interpolation) not in OPEN_CLIP_FILTERS:
        raise refusal(
            path, "interpolation", interpolation, f"one of {', '.join(OPEN_CLIP_FILTERS)}"
        )
    height, width = parse_pair(path, "image_size", size)
    if height != width:
        raise refusal(path, "image_size", size, "the side of a square")
    crops = mode == "shortest"
    return ImageSettings(
        kind=OPEN_CLIP,
        size={"shortest_edge": height} if crops else {"height": height, "width": width},
        resample=OPEN_CLIP_FILTERS[interpolation],
        image_mean=parse_channels(path, "mean", values.get("mean", CLIP_MEAN)),
        image_std=parse_channels(path, "std", values.get("std", CLIP_STD)),
        do_center_crop=crops,
        crop_size=(height, width),
    )
