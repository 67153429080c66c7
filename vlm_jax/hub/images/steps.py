"""Image preprocessing steps, one function each: Pillow for uint8, NumPy for float."""

import itertools
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.config import ConfigError
from vlm_jax.data import images as image_files
from vlm_jax.data.resize import shortest_edge_shape
from vlm_jax.hub.images.settings import ImageSettings

# An open image or its pixels, or a file.
ImageInput = Image.Image | np.ndarray | str | os.PathLike
ImageInputs = ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None


def is_image(value) -> bool:
    return isinstance(value, Image.Image | str | os.PathLike) or hasattr(value, "__array__")


def to_rows(
    images: ImageInputs, prompts: Sequence[str], image_token: str = ""
) -> list[list[ImageInput]]:
    """Returns the images of each prompt, from any nesting that transformers' processors accept.

    Args:
      images: one list per prompt; or a flat list, from which each prompt takes one image for each
        of its image tokens, or one if no prompt has any; or a single image. A single prompt takes
        all images of a flat list.
      image_token: text of the placeholder; "" if the family has none.

    Raises:
      ConfigError: the images cannot be divided among the prompts.
    """
    if images is None:
        images = ()
    elif is_image(images):
        images = [images]
    if not isinstance(images, list | tuple):
        raise ConfigError(
            f"images is of the type {type(images).__name__}: give one list of images per prompt."
        )
    if not images:
        return [[] for _ in prompts]
    if all(map(is_image, images)):
        return _divide(images, prompts, image_token)
    rows = [[row] if is_image(row) else row for row in images]
    invalid = [row for row in rows if not isinstance(row, list | tuple)]
    if invalid:
        raise ConfigError(
            f"images holds {reprlib.repr(invalid[0])}: give one list of images per prompt, [] for "
            "a prompt without images."
        )
    if len(rows) != len(prompts):
        raise ConfigError(
            f"images has {len(rows)} lists for {len(prompts)} prompts: give one list of images per "
            "prompt, [] for a prompt without images."
        )
    return [list(row) for row in rows]


def _divide(
    images: Sequence[ImageInput], prompts: Sequence[str], image_token: str
) -> list[list[ImageInput]]:
    """Divides a flat list of images among prompts, in order."""
    counts = [prompt.count(image_token) if image_token else 0 for prompt in prompts]
    if len(prompts) == 1:
        counts = [len(images)]
    elif not any(counts):
        counts = [1] * len(prompts)
    if sum(counts) != len(images):
        raise ConfigError(
            f"a flat list of {len(images)} images does not match {len(prompts)} prompts that need "
            f"{sum(counts)}: give one list of images per prompt, [] for a prompt without images."
        )
    remaining = iter(images)
    return [list(itertools.islice(remaining, count)) for count in counts]


def read(image: ImageInput) -> Image.Image:
    """Opens an image; files are rotated upright.

    Raises:
      UserError: the file or the array is not an image.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | os.PathLike):
        return image_files.upright(image_files.read_bytes(image), str(image))
    if not is_image(image):
        kind = type(image).__name__
        raise ConfigError(
            f"{kind} is not a kind of image: give a file, an open PIL image or an array of pixels."
        )
    return image_files.from_array(np.asarray(image))


def to_rgb(image: ImageInput, settings: ImageSettings) -> Image.Image:
    """Converts an image to RGB.

    A file loses its transparency first, as in `transformers.image_utils.load_image`. Open images
    that are not RGB become white where they are transparent, also if do_convert_rgb is False:
    such processors reject them.
    """
    pil = read(image)
    if pil is not image:
        return image_files.to_rgb(pil, settings.rgb_conversion)
    if not settings.do_convert_rgb and pil.mode == "RGB":
        return pil
    if "A" in pil.getbands() or pil.info.get("transparency") is not None:
        return image_files.composite_on_white(pil)
    return pil.convert("RGB")


def resized_shape(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) of an image after a resize to `ImageSettings.size`, rounded down."""
    match size:
        case {"height": new_height, "width": new_width}:
            return new_height, new_width
        case {"max_height": max_height, "max_width": max_width}:
            scale = min(max_height / height, max_width / width)
            return int(height * scale), int(width * scale)
    short, long = min(height, width), max(height, width)
    edge = size["shortest_edge"]
    if long / short * edge > size.get("longest_edge", math.inf):
        exact = size["longest_edge"] * short / long
        new_short, new_long = round(exact), int(exact * long / short)
        # transformers compares the short edge only, and then leaves the image as it is.
        if new_short == short:
            return height, width
        return (new_short, new_long) if height <= width else (new_long, new_short)
    return shortest_edge_shape(height, width, edge)


def fitting_shape(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) of an image that is shrunk to fit into `size`, but never enlarged."""
    if height <= size["height"] and width <= size["width"]:
        return height, width
    scale = min(size["height"] / height, size["width"] / width)
    return int(height * scale), int(width * scale)


def shape_in_units(height: int, width: int, unit: int, limits: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image that is shrunk into `limits`, rounded up to multiples of `unit`.

    Source: transformers, models/pixtral/image_processing_pixtral.py.
    """
    ratio = max(height / limits[0], width / limits[1])
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    rows, columns = (height - 1) // unit + 1, (width - 1) // unit + 1
    return rows * unit, columns * unit


def fitting_grid(height: int, width: int, patch_px: int, max_patches: int) -> tuple[int, int]:
    """(rows, columns) of patches of an image that is scaled to at most `max_patches` patches.

    The scale is bisected to 1e-5, from 1e-6 to 100, as in transformers' `Siglip2ImageProcessor`;
    sides are rounded up to whole patches.
    """

    def grid(scale):
        return tuple(max(1, math.ceil(side * scale / patch_px)) for side in (height, width))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        if math.prod(grid(middle)) <= max_patches:
            low = middle
        else:
            high = middle
    return grid(low)


def pad(
    pixels: np.ndarray, shape: tuple[int, int], mode: str = "constant", value: float = 0
) -> np.ndarray:
    """Pads (height, width, 3) to `shape`, with rows below and columns to the right."""
    rows, columns = shape[0] - pixels.shape[0], shape[1] - pixels.shape[1]
    if min(rows, columns) < 0:
        raise ConfigError(
            f"an image of {pixels.shape[0]} x {pixels.shape[1]} px cannot be padded to {shape}."
        )
    fill = {"constant_values": value} if mode == "constant" else {}
    return np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode, **fill)


def rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    return (pixels * np.float64(factor)).astype(np.float32)


def normalize(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    return (pixels - np.float32(mean)) / np.float32(std)


def to_values(pixels: Image.Image | np.ndarray, settings: ImageSettings) -> np.ndarray:
    """Converts an image of 0..255 to pixel values (height, width, 3) float32."""
    pixels = np.asarray(pixels)
    if settings.do_rescale:
        pixels = rescale(pixels, settings.rescale_factor)
    else:
        pixels = pixels.astype(np.float32)
    if settings.do_normalize:
        pixels = normalize(pixels, settings.image_mean, settings.image_std)
    return pixels


class PixelScale(NamedTuple):
    """Maps pixel values back to colors: value * std + mean is in 0..1, channel by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_rgb(self, values: np.ndarray) -> np.ndarray:
        """Returns pixel values (..., 3) as uint8 colors."""
        colors = np.asarray(values, np.float32) * np.float32(self.std) + np.float32(self.mean)
        return np.round(colors.clip(0, 1) * 255).astype(np.uint8)


def pixel_scale(settings: ImageSettings) -> PixelScale:
    """Returns the scale of the values of `to_values`."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.do_normalize:
        mean, std = settings.image_mean, settings.image_std
    white = 255 * settings.rescale_factor if settings.do_rescale else 255
    return PixelScale(tuple(x / white for x in mean), tuple(x / white for x in std))
