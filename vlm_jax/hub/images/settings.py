"""Image preprocessing settings of a checkpoint folder, with the defaults of its processor class."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_jax.config import CheckpointError, Vision
from vlm_jax.hub.tensors.folder import read_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
OPEN_CLIP = "open_clip_config.json"


@dataclass(frozen=True)
class ImageSettings:
    """The keys of `preprocessor_config.json` that affect pixel values, under their own names.

    Pairs are (height, width) in pixels.
    """

    kind: str  # one of `DEFAULTS`, or `OPEN_CLIP`
    #: of the resize, px; its keys are one of `SIZE_KEYS`. Qwen2-VL: least and most px of an image
    size: Mapping[str, int]
    resample: int  # one of Pillow's `Resampling`
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    do_convert_rgb: bool = False  # transparent pixels become white
    do_resize: bool = True
    do_center_crop: bool = False
    crop_size: tuple[int, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    do_pad: bool = False
    pad_size: tuple[int, int] | None = None  # None: the largest image of the batch
    padding_value: float = 0.0  # Fuyu; 0..255
    padding_mode: str = "constant"
    patch_size: tuple[int, int] = (30, 30)  # Fuyu, Qwen2-VL, Pixtral, SigLIP 2
    max_num_patches: int = 256  # SigLIP 2
    temporal_patch_size: int = 2  # Qwen2-VL: frames of a patch
    #: Qwen2-VL, Pixtral: side of the squares of patches that become a token
    merge_size: int = 2
    max_image_tiles: int = 4  # mllama
    do_image_splitting: bool = True  # Idefics3
    max_image_size: Mapping[str, int] | None = None  # Idefics3: longest_edge of a tile, px
    min_patches: int = 1  # InternVL: number of tiles
    max_patches: int = 12
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()  # LLaVA-NeXT: sizes in whole tiles

    @property
    def tile_px(self) -> int:
        """LLaVA-NeXT: side of a tile, before the resize."""
        return self.crop_size[0] if self.crop_size else next(iter(self.size.values()))

    @property
    def pads_to_square(self) -> bool:
        """LLaVA's meaning of `do_pad`: before the resize, with the mean color."""
        return self.do_pad and self.kind == "LlavaImageProcessor"

    @property
    def resizes_before_rounding(self) -> bool:
        """DINOv3: pixels keep the fractions that the resize gives them."""
        return self.kind == "DINOv3ViTImageProcessor"

    @property
    def rgb_conversion(self) -> str:
        """Value of `Vision.rgb_conversion` for files.

        `transformers.image_utils.load_image` converts every file, before do_convert_rgb.
        """
        return "convert_composite" if self.do_convert_rgb else "convert"


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
QWEN2_VL, PIXTRAL = "Qwen2VLImageProcessor", "PixtralImageProcessor"
IDEFICS3 = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
_IDEFICS3 = {
    "size": {"longest_edge": 4 * 364},
    "resample": Image.Resampling.LANCZOS,
    "do_convert_rgb": True,
    "max_image_size": {"longest_edge": 364},
}
LLAVA_ONEVISION = "LlavaOnevisionImageProcessor"
LLAVA_NEXT = ("LlavaNextImageProcessor", LLAVA_ONEVISION)
SIDES_PX = range(384, 2305, 384)  # LLaVA-OneVision

# Image processor class -> values of missing and null keys
# (transformers 5.23, `models/*/image_processing_*`).
DEFAULTS = {
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": _SQUARE
    | {"resample": BICUBIC, "do_convert_rgb": True, "default_to_square": False},
    # An image has the size of its patches.
    "Siglip2ImageProcessor": _SQUARE | {"patch_size": 16},
    "ViTImageProcessor": _SQUARE,
    "DeiTImageProcessor": {
        "size": 256,
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": 224,
    },
    "DINOv3ViTImageProcessor": _SQUARE
    | {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)},
    "FuyuImageProcessor": _SQUARE
    | {"size": {"height": 1080, "width": 1920}, "do_pad": True, "padding_value": 1.0},
    "MllamaImageProcessor": _SQUARE | {"do_convert_rgb": True, "do_pad": True},
    "Gemma3ImageProcessor": _SQUARE | {"do_convert_rgb": True},
    "IdeficsImageProcessor": _SQUARE
    | {"resample": BICUBIC, "do_convert_rgb": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "BlipImageProcessor": _SQUARE
    | {
        "size": {"height": 384, "width": 384},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    **dict.fromkeys(IDEFICS3, _IDEFICS3),
    "LlavaNextImageProcessor": _CLIP
    | {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]},
    LLAVA_ONEVISION: {
        "size": {"height": 384, "width": 384},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_grid_pinpoints": [[height, width] for height in SIDES_PX for width in SIDES_PX],
    },
    "GotOcr2ImageProcessor": {
        "size": {"height": 384, "width": 384},
        "resample": BICUBIC,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
}

DEFAULTS[QWEN2_VL] = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "resample": BICUBIC,
    "do_convert_rgb": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "patch_size": 14,
}

DEFAULTS[PIXTRAL] = {
    "size": {"longest_edge": 1024},
    "resample": BICUBIC,
    "do_convert_rgb": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "patch_size": 16,
    "merge_size": 1,
}

# `model_type` of config.json -> image processor class, if the file names none.
CLASS_OF_MODEL_TYPE = {
    "bit": "BitImageProcessor",
    "blip-2": "BlipImageProcessor",
    "clip": "CLIPImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "fuyu": "FuyuImageProcessor",
    "gemma3": "Gemma3ImageProcessor",
    "idefics": "IdeficsImageProcessor",
    "idefics3": "Idefics3ImageProcessor",
    "internvl": "GotOcr2ImageProcessor",
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": LLAVA_ONEVISION,
    "mistral3": PIXTRAL,
    "mllama": "MllamaImageProcessor",
    "paligemma": "SiglipImageProcessor",
    "qwen2_5_vl": QWEN2_VL,
    "qwen2_vl": QWEN2_VL,
    "qwen3_vl": QWEN2_VL,
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "smolvlm": "SmolVLMImageProcessor",
    "trocr": "ViTImageProcessor",
    "vit": "ViTImageProcessor",
}

MAX_PX = 2**13  # Pillow rejects larger squares as decompression bombs

SQUARE = ("height", "width")
LONGEST_EDGE = ("longest_edge",)
# Classes that need a height and a width; of these, the ones that cut images into squares.
SHAPED = ("FuyuImageProcessor", "MllamaImageProcessor", "GotOcr2ImageProcessor")
# Classes that resize whole images, without options.
WHOLE = ("DINOv3ViTImageProcessor", "Siglip2ImageProcessor", PIXTRAL)
SQUARE_TILES = ("MllamaImageProcessor", "GotOcr2ImageProcessor")
SIZE_KEYS = (
    SQUARE,
    ("shortest_edge",),
    ("shortest_edge", "longest_edge"),
    LONGEST_EDGE,
    ("max_height", "max_width"),
)
COUNTS = (
    *("max_image_tiles", "min_patches", "max_patches", "max_num_patches"),
    *("temporal_patch_size", "merge_size"),
)
PADDING_MODES = ("constant", "edge", "reflect", "symmetric")
OPEN_CLIP_RESIZES = ("shortest", "squash")
# "random" applies to training only.
OPEN_CLIP_FILTERS = {"bicubic": BICUBIC, "bilinear": BILINEAR, "random": BICUBIC}


def read_settings(folder: str | os.PathLike) -> ImageSettings:
    """Reads the settings of transformers' files, else of OpenCLIP's.

    Raises:
      CheckpointError: none of the files exists, the file is not JSON, its processor is not one of
        `DEFAULTS`, or a value is invalid.
    """
    folder = Path(folder).expanduser()
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


def vision_settings(settings: ImageSettings, vision: Vision) -> dict[str, object]:
    """Fields of `Vision` for the pixels of a processor; `vision` has the size."""
    resize, resize_px = _resize(settings, vision)
    budget = {}
    if settings.kind == QWEN2_VL:
        # Published processors allow images that no row of training has room for.
        budget["max_patches"] = min(max_patches(settings), vision.max_patches)
    return budget | {
        "image_mean": tuple(settings.image_mean),
        "image_std": tuple(settings.image_std),
        "resample": Image.Resampling(settings.resample).name.lower(),
        "resize": resize,
        "resize_px": resize_px,
        "rgb_conversion": settings.rgb_conversion,
    }


def max_patches(settings: ImageSettings) -> int:
    """Returns the maximum number of patches of an image of Qwen2-VL."""
    return settings.size["longest_edge"] // settings.patch_size[0] ** 2


def _resize(settings: ImageSettings, vision: Vision) -> tuple[str, int | None]:
    """Values of `Vision.resize` and `resize_px` for a processor."""
    if vision.tile_layouts or vision.tile_grids or settings.pads_to_square:
        return "pad", None
    if not settings.do_center_crop or tuple(settings.size) == SQUARE:
        return "squash", None
    edge = settings.size.get("shortest_edge")
    crop = (settings.crop_size or (edge,))[0]
    if edge is None or edge == crop:
        return "crop", None
    return "crop", round(edge * vision.image_size_px / crop)


def processor_config(vision: Vision) -> dict[str, Any]:
    """preprocessor_config.json of transformers for the images of the data pipeline."""
    side = vision.image_size_px
    square = {"height": side, "width": side}
    config: dict[str, Any] = {
        "do_convert_rgb": vision.rgb_conversion != "convert",
        "do_resize": True,
        "size": square,
        "resample": int(Image.Resampling[vision.resample.upper()]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    if vision.is_native:
        patch, unit = vision.patch_size_px, vision.square_px
        return config | {
            "image_processor_type": QWEN2_VL,
            "size": {"shortest_edge": unit**2, "longest_edge": vision.max_squares * unit**2},
            "patch_size": patch,
            "temporal_patch_size": vision.patch_frames,
            "merge_size": vision.patch_square,
        }
    if vision.keeps_aspect_in_tiles:
        config |= {
            "image_processor_type": "MllamaImageProcessor",
            "do_pad": True,
            "max_image_tiles": vision.tiles,
        }
    elif vision.resize == "squash":
        config |= {"image_processor_type": "ViTImageProcessor"}
    else:
        config |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": vision.shortest_edge_px},
            "do_center_crop": True,
            "crop_size": square,
        }
    if vision.resize == "pad" and not vision.keeps_aspect_in_tiles:
        config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return config


def tile_settings(kind: str, vision: Vision) -> dict[str, Any]:
    """Keys with which a processor class cuts images as training does: most make one square."""
    if kind in LLAVA_NEXT:
        side = vision.image_size_px
        pinpoints = [[rows * side, columns * side] for rows, columns in vision.tile_grids]
        return {"image_grid_pinpoints": pinpoints}
    if kind in IDEFICS3:
        side = vision.image_size_px
        return {"do_image_splitting": False, "max_image_size": {"longest_edge": side}}
    if kind == "IdeficsImageProcessor":
        return {"image_size": vision.image_size_px}
    return {"max_patches": 1} if kind == "GotOcr2ImageProcessor" else {}


def _from_transformers(path: Path, values: dict) -> ImageSettings:
    if not isinstance(values, dict):
        raise _refusal(path, "image_processor", values, "an object")
    kind = _processor_class(path, values)
    if kind == PIXTRAL:
        values = values | _pixtral_patches(path.with_name(PROCESSOR))
    values = {key: x for key, x in values.items() if x is not None}
    if kind == "IdeficsImageProcessor" and "image_size" in values:
        values["size"] = values["image_size"]
    settings = DEFAULTS[kind] | values
    settings = {key: _checked(path, key, x) for key, x in settings.items()}
    if kind == "Gemma3ImageProcessor" and settings.get("do_pan_and_scan"):
        raise _refusal(path, "do_pan_and_scan", True, "false: crops of an image are not supported")
    default_to_square = settings.get("default_to_square", True)
    if kind == QWEN2_VL:
        settings["size"] = _pixel_limits(path, settings)
    else:
        settings["size"] = _size(path, "size", settings["size"], default_to_square)
    fields = {key: x for key, x in settings.items() if key in ImageSettings.__dataclass_fields__}
    image_settings = ImageSettings(**fields | {"kind": kind})
    _check_together(path, image_settings)
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
        raise _refusal(path, "image_processor_type", name, f"one of {', '.join(DEFAULTS)}")
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
        raise _refusal(path, "resize_mode", mode, f"one of {', '.join(OPEN_CLIP_RESIZES)}")
    if str(interpolation) not in OPEN_CLIP_FILTERS:
        raise _refusal(
            path, "interpolation", interpolation, f"one of {', '.join(OPEN_CLIP_FILTERS)}"
        )
    height, width = _pair(path, "image_size", size)
    if height != width:
        raise _refusal(path, "image_size", size, "the side of a square")
    crops = mode == "shortest"
    return ImageSettings(
        kind=OPEN_CLIP,
        size={"shortest_edge": height} if crops else {"height": height, "width": width},
        resample=OPEN_CLIP_FILTERS[interpolation],
        image_mean=_channels(path, "mean", values.get("mean", CLIP_MEAN)),
        image_std=_channels(path, "std", values.get("std", CLIP_STD)),
        do_center_crop=crops,
        crop_size=(height, width),
    )


def _checked(path: Path, key: str, value: Any) -> Any:
    """Checks a JSON value and converts it to the type of its field in `ImageSettings`."""
    if key.startswith(("do_", "default_to_")) and not isinstance(value, bool):
        raise _refusal(path, key, value, "true or false")
    if key == "resample" and value not in list(Image.Resampling):
        filters = ", ".join(f"{f.value} ({f.name.lower()})" for f in Image.Resampling)
        raise _refusal(path, key, value, f"one of {filters}")
    if key == "padding_mode" and value not in PADDING_MODES:
        raise _refusal(path, key, value, f"one of {', '.join(PADDING_MODES)}")
    if key == "rescale_factor" and not _are_numbers(value):
        raise _refusal(path, key, value, "a number")
    if key == "padding_value" and not (_are_numbers(value) and 0 <= value <= 255):
        raise _refusal(path, key, value, "a number from 0 to 255")
    if key in COUNTS and not _are_lengths(value):
        raise _refusal(path, key, value, f"a whole number from 1 to {MAX_PX}")
    if key in ("image_mean", "image_std"):
        return _channels(path, key, value)
    if key in ("crop_size", "pad_size", "patch_size"):
        return _pair(path, key, value)
    if key == "image_grid_pinpoints":
        if not isinstance(value, list | tuple) or not value:
            raise _refusal(path, key, value, "a list of pairs of a height and a width")
        return tuple(_pair(path, key, size) for size in value)
    if key == "max_image_size":
        return _size(path, key, value, square=False)
    return value


def _check_together(path: Path, settings: ImageSettings) -> None:
    """Rejects combinations that the reference's processor class rejects as well."""
    if settings.do_center_crop and settings.crop_size is None:
        raise _refusal(path, "crop_size", None, "the height and width that do_center_crop leaves")
    size, size_keys = dict(settings.size), tuple(settings.size)
    has_squares = settings.kind in (QWEN2_VL, PIXTRAL, "Siglip2ImageProcessor")
    if has_squares and len(set(settings.patch_size)) > 1:
        raise _refusal(path, "patch_size", settings.patch_size, "the side of a square")
    if settings.kind in SHAPED and size_keys != SQUARE:
        raise _refusal(path, "size", size, "a height and a width")
    takes_longest_edge = settings.kind in (*IDEFICS3, PIXTRAL)
    if takes_longest_edge and size_keys not in (LONGEST_EDGE, SQUARE):
        raise _refusal(path, "size", size, "a longest_edge, or a height and a width")
    if settings.kind in IDEFICS3:
        tile = dict(settings.max_image_size)
        if tuple(tile) != LONGEST_EDGE:
            raise _refusal(path, "max_image_size", tile, "the longest_edge of a tile")
    elif size_keys == LONGEST_EDGE and not takes_longest_edge:
        raise _refusal(path, "size", size, "a shortest_edge and longest_edge, or other keys")
    if settings.kind in LLAVA_NEXT:
        _check_pinpoints(path, settings)
    if settings.kind in SQUARE_TILES and len(set(size.values())) > 1:
        raise _refusal(path, "size", size, "a square, the shape of tiles")
    if settings.kind in WHOLE and (settings.do_center_crop or not settings.do_resize):
        raise CheckpointError(f"{path}: {settings.kind} needs do_resize, without do_center_crop.")
    if settings.kind == "MllamaImageProcessor" and not (settings.do_resize and settings.do_pad):
        raise CheckpointError(
            f"{path}: images can be cut into tiles only with do_resize and do_pad."
        )


def _pixel_limits(path: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Least and most px of an image of Qwen2-VL; min_pixels and max_pixels of older files win."""
    size = settings["size"]
    limits = dict(DEFAULTS[QWEN2_VL]["size"]) | (size if isinstance(size, dict) else {})
    limits["shortest_edge"] = settings.get("min_pixels", limits["shortest_edge"])
    limits["longest_edge"] = settings.get("max_pixels", limits["longest_edge"])
    values = tuple(limits.values())
    is_valid = all(type(value) is int and 0 < value <= MAX_PX**2 for value in values)
    if tuple(limits) != ("shortest_edge", "longest_edge") or not is_valid:
        raise _refusal(path, "size", size, f"a shortest_edge and longest_edge of 1 to {MAX_PX**2}")
    return limits


def _check_pinpoints(path: Path, settings: ImageSettings) -> None:
    if (
        tuple(settings.size) not in (SQUARE, ("shortest_edge",))
        or len({*settings.size.values()}) > 1
    ):
        raise _refusal(path, "size", dict(settings.size), "a square, or a shortest_edge")
    if not settings.do_resize:
        raise _refusal(path, "do_resize", False, "true: the whole image is resized to a tile")
    for size in settings.image_grid_pinpoints:
        if any(px % settings.tile_px for px in size):
            raise _refusal(
                *(path, "image_grid_pinpoints", list(size)),
                f"heights and widths in whole tiles of {settings.tile_px} px",
            )


def _size(path: Path, key: str, value: Any, square: bool) -> dict[str, int]:
    """Converts a size to one of `SIZE_KEYS`.

    A number is both sides if `square`, else the shorter side.
    """
    if _are_lengths(value):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list | tuple) and len(value) == 2:
        value = dict(zip(SQUARE, value))
    for keys in SIZE_KEYS:
        if isinstance(value, dict) and set(value) == set(keys) and _are_lengths(*value.values()):
            return {key: value[key] for key in keys}
    choices = "; ".join(" and ".join(keys) for keys in SIZE_KEYS)
    raise _refusal(
        path, key, value, f"px from 1 to {MAX_PX}, as a number or as an object of {choices}"
    )


def _pair(path: Path, key: str, value: Any) -> tuple[int, int]:
    size = _size(path, key, value, square=True)
    if tuple(size) != SQUARE:
        raise _refusal(path, key, value, "a height and a width")
    return tuple(size.values())


def _channels(path: Path, key: str, value: Any) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not _are_numbers(*values) or not all(map(math.isfinite, values)):
        raise _refusal(path, key, value, "a finite number, or one for each of three channels")
    if key.endswith("std") and 0 in values:
        raise _refusal(path, key, value, "other than 0, because images are divided by it")
    return values


def _are_numbers(*values) -> bool:
    return all(type(value) in (int, float) for value in values)


def _are_lengths(*values) -> bool:
    return all(type(value) is int and 0 < value <= MAX_PX for value in values)


def _refusal(path: Path, key: str, value: Any, choices: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {value!r}, but must be {choices}.")
