"""How a checkpoint wants its images: the settings in its folder's files, completed by its processor's defaults."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_jax.config import CheckpointError, Vision
from vlm_jax.hub.tensors.folder import read_json

PREPROCESSOR, PROCESSOR, OPEN_CLIP = (
    "preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
)


@dataclass(frozen=True)
class ImageSettings:
    """The keys of `preprocessor_config.json` that decide about pixels, in its names; sizes are (height, width) px."""

    kind: str  # one of `DEFAULTS`, or `OPEN_CLIP`
    size: Mapping[str, int]  # of the resize; its keys, one of `SIZE_KEYS`, say what they measure
    resample: int  # one of Pillow's `Resampling`
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    do_convert_rgb: bool = False  # what is transparent becomes white, instead of what lies under it
    do_resize: bool = True
    do_center_crop: bool = False
    crop_size: tuple[int, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    do_pad: bool = False
    pad_size: tuple[int, int] | None = None  # None: the largest of the batch
    padding_value: float = 0.0  # Fuyu's, on the scale of 0..255
    padding_mode: str = "constant"
    patch_size: tuple[int, int] = (30, 30)  # Fuyu's
    max_image_tiles: int = 4  # mllama's

    @property
    def pads_to_square(self) -> bool:
        """LLaVA's meaning of `do_pad`: before the resize, and in the colour of the mean."""
        return self.do_pad and self.kind == "LlavaImageProcessor"


BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SQUARE = {"size": {"height": 224, "width": 224}, "resample": BILINEAR}
_CLIP = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": BICUBIC,
    "do_convert_rgb": True,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}

# Image processor -> what it means by a key that is missing or null (transformers 5.23, `models/*/image_processing_*`).
DEFAULTS = {
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": _SQUARE
    | {"resample": BICUBIC, "do_convert_rgb": True, "default_to_square": False},
    "ViTImageProcessor": _SQUARE,
    "DeiTImageProcessor": {
        "size": 256,
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": 224,
    },
    "FuyuImageProcessor": _SQUARE
    | {"size": {"height": 1080, "width": 1920}, "do_pad": True, "padding_value": 1.0},
    "MllamaImageProcessor": _SQUARE | {"do_convert_rgb": True, "do_pad": True},
}

# `model_type` of config.json -> processor, where the file names none.
OF_MODEL_TYPE = {
    "bit": "BitImageProcessor",
    "clip": "CLIPImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "fuyu": "FuyuImageProcessor",
    "llava": "LlavaImageProcessor",
    "mllama": "MllamaImageProcessor",
    "paligemma": "SiglipImageProcessor",
    "siglip": "SiglipImageProcessor",
    "trocr": "ViTImageProcessor",
    "vit": "ViTImageProcessor",
}

MOST_PX = 2**13  # an image of this height and width is the largest that Pillow takes for no bomb

SQUARE = ("height", "width")
SIZE_KEYS = (
    SQUARE,
    ("shortest_edge",),
    ("shortest_edge", "longest_edge"),
    ("max_height", "max_width"),
)
PADDING_MODES = ("constant", "edge", "reflect", "symmetric")
OPEN_CLIP_RESIZES = ("shortest", "squash")
OPEN_CLIP_FILTERS = {
    "bicubic": BICUBIC,
    "bilinear": BILINEAR,
    "random": BICUBIC,
}  # random: in training alone


def read_settings(folder: str | os.PathLike) -> ImageSettings:
    """The settings in a folder: transformers' `processor_config.json` or `preprocessor_config.json`, else OpenCLIP's.

    Raises:
      CheckpointError: none of the files, no JSON in it, a processor that is not one of `DEFAULTS`, or a value that its
        key cannot have.
    """
    folder = Path(folder).expanduser()
    if os.path.isfile(
        folder / PROCESSOR
    ):  # transformers 5 keeps all of a processor in it; 4 never the images' part
        given = read_json(folder / PROCESSOR).get("image_processor")
        if given is not None:
            return _of_transformers(folder / PROCESSOR, given)
    if os.path.isfile(folder / PREPROCESSOR):
        return _of_transformers(folder / PREPROCESSOR, read_json(folder / PREPROCESSOR))
    if os.path.isfile(folder / OPEN_CLIP):
        return _of_open_clip(folder / OPEN_CLIP, read_json(folder / OPEN_CLIP))
    raise CheckpointError(
        f"{folder} does not say how images are prepared: there is no {PREPROCESSOR}, {PROCESSOR} with an "
        f"image_processor, or {OPEN_CLIP}."
    )


def vision_settings(settings: ImageSettings, vision: Vision) -> dict[str, object]:
    """The fields of `Vision` for how a processor resizes and normalises images; `vision` has their size."""
    resize, resize_px = _resize(settings, vision)
    return {
        "image_mean": tuple(settings.image_mean),
        "image_std": tuple(settings.image_std),
        "resample": Image.Resampling(settings.resample).name.lower(),
        "resize": resize,
        "resize_px": resize_px,
    }


def _resize(settings: ImageSettings, vision: Vision) -> tuple[str, int]:
    """`Vision.resize` and `resize_px` of a processor."""
    if vision.tile_layouts or settings.pads_to_square:
        return "pad", 0
    if not settings.do_center_crop or tuple(settings.size) == SQUARE:
        return "squash", 0
    edge = settings.size.get("shortest_edge", 0)
    crop = (settings.crop_size or (edge,))[0]
    return "crop", 0 if edge == crop else round(edge * vision.image_size_px / crop)


def processor_config(vision: Vision) -> dict[str, Any]:
    """The preprocessor_config.json of transformers for how the data pipeline prepares images."""
    side = vision.image_size_px
    square = {"height": side, "width": side}
    config: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": int(Image.Resampling[vision.resample.upper()]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    if vision.keeps_aspect_in_tiles:
        kind = {
            "image_processor_type": "MllamaImageProcessor",
            "do_pad": True,
            "max_image_tiles": vision.tiles,
        }
    elif vision.resize == "squash":
        kind = {"image_processor_type": "ViTImageProcessor"}
    else:
        pads = vision.resize == "pad"
        kind = {
            "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
            "size": {"shortest_edge": vision.resize_px or side},
            "do_center_crop": True,
            "crop_size": square,
        }
        kind |= {"do_pad": True} if pads else {}
    return config | kind


def _of_transformers(path: Path, given: dict) -> ImageSettings:
    if not isinstance(given, dict):
        raise _refusal(path, "image_processor", given, "an object")
    kind = _kind(path, given)
    chosen = DEFAULTS[kind] | {key: value for key, value in given.items() if value is not None}
    chosen = {key: _checked(path, key, value) for key, value in chosen.items()}
    chosen["size"] = _size(path, "size", chosen["size"], chosen.get("default_to_square", True))
    known = {
        key: value for key, value in chosen.items() if key in ImageSettings.__dataclass_fields__
    }
    settings = ImageSettings(**known | {"kind": kind})
    _check_together(path, settings)
    return settings


def _kind(path: Path, given: dict) -> str:
    name = given.get("image_processor_type")
    if name is None:
        name = given.get("feature_extractor_type")  # before transformers 4.26
    if name is None and os.path.isfile(path.with_name("config.json")):
        name = OF_MODEL_TYPE.get(str(read_json(path.with_name("config.json")).get("model_type")))
    known = (
        str(name)
        .replace("FeatureExtractor", "ImageProcessor")
        .removesuffix("Fast")
        .removesuffix("Pil")
    )
    if known not in DEFAULTS:
        raise _refusal(path, "image_processor_type", name, f"one of {', '.join(DEFAULTS)}")
    return known


def _of_open_clip(path: Path, given: dict) -> ImageSettings:
    """OpenCLIP's `preprocess_cfg` for inference (`open_clip.transform.image_transform`); the size is the model's."""
    try:
        size = given["model_cfg"]["vision_cfg"].get("image_size", 224)
        chosen = {
            key: value
            for key, value in given.get("preprocess_cfg", {}).items()
            if value is not None
        }
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} has no model_cfg with a vision_cfg, or its preprocess_cfg is no object."
        ) from None
    mode, interpolation = (
        chosen.get("resize_mode", "shortest"),
        chosen.get("interpolation", "bicubic"),
    )
    if mode not in OPEN_CLIP_RESIZES:
        raise _refusal(path, "resize_mode", mode, f"one of {', '.join(OPEN_CLIP_RESIZES)}")
    if str(interpolation) not in OPEN_CLIP_FILTERS:
        raise _refusal(
            path, "interpolation", interpolation, f"one of {', '.join(OPEN_CLIP_FILTERS)}"
        )
    height, width = _pair(path, "image_size", size)
    if height != width:
        raise _refusal(path, "image_size", size, "the side of a square")
    return ImageSettings(
        kind=OPEN_CLIP,
        size={"shortest_edge": height}
        if mode == "shortest"
        else {"height": height, "width": width},
        resample=OPEN_CLIP_FILTERS[interpolation],
        image_mean=_channels(path, "mean", chosen.get("mean", CLIP_MEAN)),
        image_std=_channels(path, "std", chosen.get("std", CLIP_STD)),
        do_center_crop=mode == "shortest",
        crop_size=(height, width),
    )


def _checked(path: Path, key: str, value: Any) -> Any:
    """A value of JSON as the field of `ImageSettings` holds it."""
    if key.startswith(("do_", "default_to_")) and not isinstance(value, bool):
        raise _refusal(path, key, value, "true or false")
    if key == "resample" and value not in list(Image.Resampling):
        raise _refusal(
            path,
            key,
            value,
            "one of " + ", ".join(f"{f.value} ({f.name.lower()})" for f in Image.Resampling),
        )
    if key == "padding_mode" and value not in PADDING_MODES:
        raise _refusal(path, key, value, f"one of {', '.join(PADDING_MODES)}")
    if key == "rescale_factor" and not _are_numbers(value):
        raise _refusal(path, key, value, "a number")
    if key == "padding_value" and not (_are_numbers(value) and 0 <= value <= 255):
        raise _refusal(path, key, value, "a number from 0 to 255")
    if key == "max_image_tiles" and not _are_lengths(value):
        raise _refusal(path, key, value, f"a whole number from 1 to {MOST_PX}")
    if key in ("image_mean", "image_std"):
        return _channels(path, key, value)
    if key in ("crop_size", "pad_size", "patch_size"):
        return _pair(path, key, value)
    return value


def _check_together(path: Path, settings: ImageSettings) -> None:
    """Refuses what the reference's processor of this kind refuses too."""
    if settings.do_center_crop and settings.crop_size is None:
        raise _refusal(path, "crop_size", None, "the height and width that do_center_crop leaves")
    if (
        settings.kind in ("FuyuImageProcessor", "MllamaImageProcessor")
        and tuple(settings.size) != SQUARE
    ):
        raise _refusal(path, "size", dict(settings.size), "a height and a width")
    if settings.kind == "MllamaImageProcessor":
        if len(set(settings.size.values())) > 1:
            raise _refusal(path, "size", dict(settings.size), "as high as wide, as tiles are")
        if not (settings.do_resize and settings.do_pad):
            raise CheckpointError(
                f"{path}: images are cut into tiles only with both do_resize and do_pad."
            )


def _size(path: Path, key: str, value: Any, square: bool) -> dict[str, int]:
    """What `size` may be -> one of `SIZE_KEYS`; one number is the shorter edge where it is not both."""
    if _are_lengths(value):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        value = dict(zip(SQUARE, value))
    for keys in SIZE_KEYS:
        if isinstance(value, dict) and set(value) == set(keys) and _are_lengths(*value.values()):
            return {key: value[key] for key in keys}
    choices = "; ".join(" and ".join(keys) for keys in SIZE_KEYS)
    raise _refusal(
        path, key, value, f"px from 1 to {MOST_PX}, as a number or as an object of {choices}"
    )


def _pair(path: Path, key: str, value: Any) -> tuple[int, int]:
    size = _size(path, key, value, square=True)
    if tuple(size) != SQUARE:
        raise _refusal(path, key, value, "a height and a width")
    return tuple(size.values())


def _channels(path: Path, key: str, value: Any) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not _are_numbers(*values):
        raise _refusal(path, key, value, "a number, or one for each of three channels")
    if key.endswith("std") and 0 in values:
        raise _refusal(path, key, value, "other than 0, as images are divided by it")
    return values


def _are_numbers(*values) -> bool:
    return all(type(value) in (int, float) for value in values)


def _are_lengths(*values) -> bool:
    return all(type(value) is int and 0 < value <= MOST_PX for value in values)


def _refusal(path: Path, key: str, value: Any, choices: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {value!r}, but has to be {choices}.")
