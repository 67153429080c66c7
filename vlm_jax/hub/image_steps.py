"""What a picture goes through on its way to a model: a function a step, in Pillow until its numbers leave 0..255."""

import math
import os
from collections.abc import Mapping

import numpy as np
from PIL import Image

from vlm_jax.config import ConfigError
from vlm_jax.data.images import from_array, read_bytes, upright
from vlm_jax.data.resize import shortest_edge_shape
from vlm_jax.hub.image_settings import ImageSettings

Picture = Image.Image | np.ndarray | str | os.PathLike  # an open image, taken as it is, its pixels, or a file


def read(picture: Picture) -> Image.Image:
    """An open image as it is; the one in a file upright. ConfigError names a file that holds none."""
    if isinstance(picture, np.ndarray):
        return from_array(picture)
    return picture if isinstance(picture, Image.Image) else upright(read_bytes(picture), str(picture))


def to_rgb(picture: Picture, whiten: bool) -> Image.Image:
    """Any picture -> RGB; `whiten`: what is transparent becomes white.

    A file loses its transparency before, as in `transformers.image_utils.load_image`. Processors that do not whiten
    refuse open images of other modes than RGB; here those are whitened.
    """
    image = read(picture)
    if image is not picture:
        image = image.convert("RGB")
    if not whiten and image.mode == "RGB":
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resized_shape(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """The (height, width) that an image gets from `ImageSettings.size`; fractions of a pixel are dropped."""
    match size:
        case {"height": new_height, "width": new_width}:
            return new_height, new_width
        case {"max_height": most_rows, "max_width": most_columns}:
            scale = min(most_rows / height, most_columns / width)
            return int(height * scale), int(width * scale)
    short, long = min(height, width), max(height, width)
    edge = size["shortest_edge"]
    if long / short * edge > size.get("longest_edge", math.inf):
        exact = size["longest_edge"] * short / long
        new_short, new_long = round(exact), int(exact * long / short)
        if new_short == short:
            return height, width
        return (new_short, new_long) if height <= width else (new_long, new_short)
    return shortest_edge_shape(height, width, edge)


def fitting_shape(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """As `resized_shape`, but only images that are too large change, until they fit."""
    if height <= size["height"] and width <= size["width"]:
        return height, width
    scale = min(size["height"] / height, size["width"] / width)
    return int(height * scale), int(width * scale)


def pad(pixels: np.ndarray, shape: tuple[int, int], mode: str = "constant", value: float = 0) -> np.ndarray:
    """(height, width, 3) -> `shape`, more rows below and columns to the right."""
    rows, columns = (new - old for new, old in zip(shape, pixels.shape))
    if min(rows, columns) < 0:
        raise ConfigError(f"an image of {pixels.shape[0]} x {pixels.shape[1]} px cannot be padded to {shape}.")
    fill = {"constant_values": value} if mode == "constant" else {}
    return np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode, **fill)


def rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    return (pixels * np.float64(factor)).astype(np.float32)


def normalise(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    return (pixels - np.float32(mean)) / np.float32(std)


def to_values(pixels: Image.Image | np.ndarray, settings: ImageSettings) -> np.ndarray:
    """An image of 0..255 -> (height, width, 3) float32 as the model reads it."""
    pixels = np.asarray(pixels)
    pixels = rescale(pixels, settings.rescale_factor) if settings.do_rescale else pixels.astype(np.float32)
    return normalise(pixels, settings.image_mean, settings.image_std) if settings.do_normalize else pixels
