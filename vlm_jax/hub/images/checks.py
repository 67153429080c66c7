"""Checks of the values of an image preprocessing config."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_jax.config import CheckpointError
from vlm_jax.hub.images.defaults import DEFAULTS
from vlm_jax.hub.images.settings import (
    IDEFICS3,
    LLAVA_NEXT,
    PIXTRAL,
    QWEN2_VL,
    SQUARE,
    ImageSettings,
)

MAX_PX = 2**13  # Pillow rejects larger squares as decompression bombs
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


def check_value(path: Path, key: str, value: Any) -> Any:
    """Checks a JSON value and converts it to the type of its field in `ImageSettings`."""
    if key.startswith(("do_", "default_to_")) and not isinstance(value, bool):
        raise refusal(path, key, value, "true or false")
    if key == "resample" and value not in list(Image.Resampling):
        filters = ", ".join(f"{f.value} ({f.name.lower()})" for f in Image.Resampling)
        raise refusal(path, key, value, f"one of {filters}")
    if key == "padding_mode" and value not in PADDING_MODES:
        raise refusal(path, key, value, f"one of {', '.join(PADDING_MODES)}")
    if key == "rescale_factor" and not _are_numbers(value):
        raise refusal(path, key, value, "a number")
    if key == "padding_value" and not (_are_numbers(value) and 0 <= value <= 255):
        raise refusal(path, key, value, "a number from 0 to 255")
    if key in COUNTS and not _are_lengths(value):
        raise refusal(path, key, value, f"a whole number from 1 to {MAX_PX}")
    if key in ("image_mean", "image_std"):
        return parse_channels(path, key, value)
    if key in ("crop_size", "pad_size", "patch_size"):
        return parse_pair(path, key, value)
    if key == "image_grid_pinpoints":
        if not isinstance(value, list | tuple) or not value:
            raise refusal(path, key, value, "a list of pairs of a height and a width")
        return tuple(parse_pair(path, key, size) for size in value)
    if key == "max_image_size":
        return parse_size(path, key, value, square=False)
    return value


def check_together(path: Path, settings: ImageSettings) -> None:
    """Rejects combinations that the reference's processor class rejects as well."""
    if settings.do_center_crop and settings.crop_size is None:
        raise refusal(path, "crop_size", None, "the height and width that do_center_crop leaves")
    size, size_keys = dict(settings.size), tuple(settings.size)
    has_squares = settings.kind in (QWEN2_VL, PIXTRAL, "Siglip2ImageProcessor")
    if has_squares and len(set(settings.patch_size)) > 1:
        raise refusal(path, "patch_size", settings.patch_size, "the side of a square")
    if settings.kind in SHAPED and size_keys != SQUARE:
        raise refusal(path, "size", size, "a height and a width")
    takes_longest_edge = settings.kind in (*IDEFICS3, PIXTRAL)
    if takes_longest_edge and size_keys not in (LONGEST_EDGE, SQUARE):
        raise refusal(path, "size", size, "a longest_edge, or a height and a width")
    if settings.kind in IDEFICS3:
        tile = dict(settings.max_image_size)
        if tuple(tile) != LONGEST_EDGE:
            raise refusal(path, "max_image_size", tile, "the longest_edge of a tile")
    elif size_keys == LONGEST_EDGE and not takes_longest_edge:
        raise refusal(path, "size", size, "a shortest_edge and longest_edge, or other keys")
    if settings.kind in LLAVA_NEXT:
        _check_pinpoints(path, settings)
    if settings.kind in SQUARE_TILES and len(set(size.values())) > 1:
        raise refusal(path, "size", size, "a square, the shape of tiles")
    if settings.kind in WHOLE and (settings.do_center_crop or not settings.do_resize):
        raise CheckpointError(f"{path}: {settings.kind} needs do_resize, without do_center_crop.")
    if settings.kind == "MllamaImageProcessor" and not (settings.do_resize and settings.do_pad):
        raise CheckpointError(
            f"{path}: images can be cut into tiles only with do_resize and do_pad."
        )


def pixel_limits(path: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Least and most px of an image of Qwen2-VL; min_pixels and max_pixels of older files win."""
    size = settings["size"]
    limits = dict(DEFAULTS[QWEN2_VL]["size"]) | (size if isinstance(size, dict) else {})
    limits["shortest_edge"] = settings.get("min_pixels", limits["shortest_edge"])
    limits["longest_edge"] = settings.get("max_pixels", limits["longest_edge"])
    values = tuple(limits.values())
    is_valid = all(type(value) is int and 0 < value <= MAX_PX**2 for value in values)
    if tuple(limits) != ("shortest_edge", "longest_edge") or not is_valid:
        raise refusal(path, "size", size, f"a shortest_edge and longest_edge of 1 to {MAX_PX**2}")
    return limits


def _check_pinpoints(path: Path, settings: ImageSettings) -> None:
    if (
        tuple(settings.size) not in (SQUARE, ("shortest_edge",))
        or len({*settings.size.values()}) > 1
    ):
        raise refusal(path, "size", dict(settings.size), "a square, or a shortest_edge")
    if not settings.do_resize:
        raise refusal(path, "do_resize", False, "true: the whole image is resized to a tile")
    for size in settings.image_grid_pinpoints:
        if any(px % settings.tile_px for px in size):
            raise refusal(
                *(path, "image_grid_pinpoints", list(size)),
                f"heights and widths in whole tiles of {settings.tile_px} px",
            )


def parse_size(path: Path, key: str, value: Any, square: bool) -> dict[str, int]:
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
    raise refusal(
        path, key, value, f"px from 1 to {MAX_PX}, as a number or as an object of {choices}"
    )


def parse_pair(path: Path, key: str, value: Any) -> tuple[int, int]:
    size = parse_size(path, key, value, square=True)
    if tuple(size) != SQUARE:
        raise refusal(path, key, value, "a height and a width")
    return tuple(size.values())


def parse_channels(path: Path, key: str, value: Any) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not _are_numbers(*values) or not all(map(math.isfinite, values)):
        raise refusal(path, key, value, "a finite number, or one for each of three channels")
    if key.endswith("std") and 0 in values:
        raise refusal(path, key, value, "other than 0, because images are divided by it")
    return values


def _are_numbers(*values) -> bool:
    return all(type(value) in (int, float) for value in values)


def _are_lengths(*values) -> bool:
    return all(type(value) is int and 0 < value <= MAX_PX for value in values)


def refusal(path: Path, key: str, value: Any, choices: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {value!r}, but must be {choices}.")
