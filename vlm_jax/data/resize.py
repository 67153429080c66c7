"""Resizing, cropping and padding of Pillow images."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from vlm_jax.config import Vision


def resize(image: Image.Image, shape: tuple[int, int], resample: int) -> Image.Image:
    """Resizes to (height, width), at least one pixel each."""
    height, width = shape
    return image.resize((max(1, width), max(1, height)), resample)


def resize_unrounded(image: Image.Image, shape: tuple[int, int], resample: int) -> np.ndarray:
    """Resizes an RGB image to (height, width); returns (height, width, 3) float32 in 0..255."""
    bands = [resize(band.convert("F"), shape, resample) for band in image.split()]
    return np.stack([np.asarray(band) for band in bands], axis=-1)


def shortest_edge_shape(height: int, width: int, edge: int) -> tuple[int, int]:
    """Returns the (height, width) whose shorter side is `edge`, rounded down."""
    if min(height, width) == edge:
        return height, width
    longer = int(edge * max(height, width) / min(height, width))
    return (edge, longer) if height <= width else (longer, edge)


def center_crop(
    image: Image.Image, shape: tuple[int, int], round_margin: Callable = math.floor
) -> Image.Image:
    """Crops the middle (height, width), with black borders if it is larger than the image.

    `round_margin` rounds the left and upper margins.
    """
    height, width = shape
    left = round_margin((image.width - width) / 2)
    top = round_margin((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Centers an RGB image on a square of this color."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def to_square(image: Image.Image, vision: Vision) -> Image.Image:
    """Resizes an RGB image to a square of `vision.image_size_px`, by `vision.resize`.

    Source: transformers, `CLIPImageProcessor` (crop) and `LlavaImageProcessor` (pad).
    """
    side, resample = vision.image_size_px, Image.Resampling[vision.resample.upper()]
    if vision.resize == "crop":
        shape = shortest_edge_shape(image.height, image.width, vision.shortest_edge_px)
        return center_crop(resize(image, shape, resample), (side, side))
    if vision.resize == "pad":
        image = pad_to_square(image, tuple(int(mean * 255) for mean in vision.image_mean))
    return image if image.size == (side, side) else resize(image, (side, side), resample)
