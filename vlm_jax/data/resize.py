"""Resizing, cropping and padding of Pillow images."""

import math
from collections.abc import Callable

from PIL import Image

from vlm_jax.config import Vision


def resize(image: Image.Image, shape: tuple[int, int], resample: int) -> Image.Image:
    """Resizes to (height, width), at least one pixel each."""
    height, width = (max(1, side) for side in shape)
    return image.resize((width, height), resample)


def shortest_edge_shape(height: int, width: int, edge: int) -> tuple[int, int]:
    """The (height, width) whose shorter side is `edge`; a fraction of a pixel is dropped."""
    if min(height, width) == edge:
        return height, width
    longer = int(edge * max(height, width) / min(height, width))
    return (edge, longer) if height <= width else (longer, edge)


def center_crop(
    image: Image.Image, shape: tuple[int, int], whole: Callable = math.floor
) -> Image.Image:
    """The middle (height, width), with black borders where it is larger than the image.

    `whole` rounds the left and upper margins.
    """
    height, width = shape
    left, top = whole((image.width - width) / 2), whole((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The RGB image in the middle of a square of this colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def to_square(image: Image.Image, vision: Vision) -> Image.Image:
    """An RGB image -> a square of `vision.image_size_px`, by `vision.resize`.

    Source: transformers, `CLIPImageProcessor` (crop) and `LlavaImageProcessor` (pad).
    """
    side, resample = vision.image_size_px, Image.Resampling[vision.resample.upper()]
    if vision.resize == "crop":
        edge = vision.resize_px or side
        shape = shortest_edge_shape(image.height, image.width, edge)
        return center_crop(resize(image, shape, resample), (side, side))
    if vision.resize == "pad":
        image = pad_to_square(image, tuple(int(mean * 255) for mean in vision.image_mean))
    return image if image.size == (side, side) else resize(image, (side, side), resample)
