"""Images -> the numbers that a public checkpoint reads, exactly as its own processor makes them.

The reference is transformers 5.23 with its Pillow backend (`AutoImageProcessor.from_pretrained(folder,
backend="pil")`), and open_clip's transform for inference. Tests compare the two to 1e-5.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import einops
import numpy as np

from vlm_jax.config import CheckpointError
from vlm_jax.data.resize import center_crop, pad_to_square, resize
from vlm_jax.hub.images.mllama_tiles import pack_tiles
from vlm_jax.hub.images.settings import (
    OPEN_CLIP,
    SQUARE,
    ImageSettings,
    read_settings,
)
from vlm_jax.hub.images.steps import (
    ImageInput,
    ImageInputs,
    fitting_shape,
    is_picture,
    pad,
    read,
    resized_shape,
    to_rgb,
    to_values,
)


@dataclass(frozen=True)
class ProcessedImages:
    """What a model reads; channels are last, where the reference has them first."""

    # (I, height, width, 3) float32; Fuyu: (P, patch_height * patch_width * 3), the patches of all images, row by row;
    # mllama: (B, I, J, height, width, 3), 0 where there is no tile.
    pixel_values: np.ndarray
    grids: np.ndarray | None = (
        None  # Fuyu: (I, 2) int32, rows and columns of patches of every image
    )
    aspect_ratio_ids: np.ndarray | None = (
        None  # mllama: (B, I) int32, how the tiles lie; 0: no image
    )
    aspect_ratio_mask: np.ndarray | None = None  # mllama: (B, I, J) int32, 1: a tile
    num_tiles: list[list[int]] | None = None  # mllama: of every image of every row


@dataclass(frozen=True)
class ImageProcessor:
    """The preprocessing that a checkpoint's folder describes."""

    settings: ImageSettings

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ImageProcessor":
        """Reads `processor_config.json`, `preprocessor_config.json` or `open_clip_config.json`, the first there is.

        Raises:
          CheckpointError: none of them, no JSON in it, or settings that are not understood.
        """
        return cls(read_settings(folder))

    def __call__(self, images: ImageInputs) -> ProcessedImages:
        """One picture, a list of pictures, or rows of them -> pixels.

        Args:
          images: image files, which are turned upright, or open Pillow images or uint8 arrays (height, width, 3), which
            are taken as they are. Only for mllama do rows matter: each is an example, and a flat list is one.

        Raises:
          CheckpointError: a file that holds no image, or images that do not fit the settings or one another.
        """
        images = [images] if is_picture(images) else images
        if self.settings.kind == "MllamaImageProcessor":
            rows = images if all(isinstance(row, list | tuple) for row in images) else [images]
            return ProcessedImages(**pack_tiles(rows, self.settings))
        if self.settings.kind == "FuyuImageProcessor":
            patches, grids = zip(*[_patches(picture, self.settings) for picture in _flat(images)])
            return ProcessedImages(np.concatenate(patches), grids=np.array(grids, np.int32))
        to_pixels = _open_clip if self.settings.kind == OPEN_CLIP else _pixels
        return ProcessedImages(
            _stack([to_pixels(picture, self.settings) for picture in _flat(images)], self.settings)
        )


def _flat(images) -> Iterator[ImageInput]:
    for item in images:
        yield from item if isinstance(item, list | tuple) else [item]


def _pixels(picture: ImageInput, settings: ImageSettings) -> np.ndarray:
    image = to_rgb(picture, settings.do_convert_rgb)
    if settings.pads_to_square:
        image = pad_to_square(image, tuple(int(mean * 255) for mean in settings.image_mean))
    if settings.do_resize:
        image = resize(
            image, resized_shape(image.height, image.width, settings.size), settings.resample
        )
    if settings.do_center_crop:
        image = center_crop(image, settings.crop_size)
    return to_values(image, settings)


def _open_clip(picture: ImageInput, settings: ImageSettings) -> np.ndarray:
    """Resizes before it converts, so that the filter sees the image's own mode; and rounds the crop to even."""
    image = read(picture)
    image = resize(
        image, resized_shape(image.height, image.width, settings.size), settings.resample
    )
    if settings.do_center_crop:
        image = center_crop(image, settings.crop_size, whole=round)
    return to_values(image.convert("RGB"), settings)


def _patches(picture: ImageInput, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int]]:
    """Fuyu's patches (P, C), of the image and as much of its padding as fills them, and the (rows, columns) of them."""
    image = to_rgb(picture, settings.do_convert_rgb)
    if settings.do_resize:
        image = resize(
            image, fitting_shape(image.height, image.width, settings.size), settings.resample
        )
    pixels = np.asarray(image)
    if settings.do_pad:
        pixels = pad(
            pixels,
            [settings.size[side] for side in SQUARE],
            settings.padding_mode,
            settings.padding_value,
        )
    grid = tuple(
        math.ceil(side / patch)
        for side, patch in zip((image.height, image.width), settings.patch_size)
    )
    height, width = (n * patch for n, patch in zip(grid, settings.patch_size))
    if height > len(pixels) or width > len(pixels[0]):
        raise CheckpointError(
            f"an image of {len(pixels)} x {len(pixels[0])} px is not cut into patches of {settings.patch_size}: "
            "size has to be a multiple of patch_size, with do_pad."
        )
    pixels = to_values(pixels[:height, :width], settings)
    return einops.rearrange(pixels, "(r p) (c q) d -> (r c) (p q d)", r=grid[0], c=grid[1]), grid


def _stack(images: list[np.ndarray], settings: ImageSettings) -> np.ndarray:
    if settings.do_pad and not settings.pads_to_square:
        largest = tuple(max(image.shape[axis] for image in images) for axis in (0, 1))
        images = [pad(image, settings.pad_size or largest) for image in images]
    shapes = sorted({image.shape[:2] for image in images})
    if len(shapes) > 1:
        raise CheckpointError(
            f"images of a batch get different sizes, {shapes}: process them one by one, or set do_pad."
        )
    return np.stack(images)
