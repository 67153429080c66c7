"""Image preprocessing of public checkpoints: images -> pixel values.

The reference is transformers 5.23 with its Pillow backend
(`AutoImageProcessor.from_pretrained(folder, backend="pil")`), and open_clip's transform for
inference. Tests compare the two to 1e-5.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import einops
import numpy as np

from vlm_jax.config import CheckpointError
from vlm_jax.data import native
from vlm_jax.data.resize import center_crop, pad_to_square, resize, resize_unrounded
from vlm_jax.hub.images.files import read_settings
from vlm_jax.hub.images.mllama_tiles import pack_tiles
from vlm_jax.hub.images.settings import (
    LLAVA_NEXT,
    OPEN_CLIP,
    PIXTRAL,
    QWEN2_VL,
    SQUARE,
    ImageSettings,
)
from vlm_jax.hub.images.steps import (
    ImageInput,
    ImageInputs,
    fitting_grid,
    fitting_shape,
    is_image,
    pad,
    read,
    resized_shape,
    shape_in_units,
    to_rgb,
    to_values,
)
from vlm_jax.hub.images.tile_cutters import CUTTERS_OF_SEVERAL, TILE_CUTTERS


@dataclass(frozen=True)
class ProcessedImages:
    """Image inputs of a model; channels are last (in the reference, first).

    Attributes:
      pixel_values: (I, height, width, 3) float32; I counts every tile (`TILE_CUTTERS`).
        Fuyu: (P, patch_height * patch_width * 3), the patches of all images, row by row.
        Qwen2-VL: (P, 3 * frames * patch_height * patch_width), square by square of the projector.
        mllama: (B, I, J, height, width, 3), 0 in blank tiles.
        SigLIP 2: (I, P, C), the patches of every image, padded with zeros to `max_num_patches`.
      grids: Fuyu, Qwen2-VL, SigLIP 2: (I, 2) int32, rows and columns of patches of every image.
      aspect_ratio_ids: mllama: (B, I) int32, layout of the tiles; 0: no image.
      aspect_ratio_mask: mllama: (B, I, J) int32, 1: a tile.
      num_tiles: mllama: number of tiles of every image of every row.
      tile_grids: rows and columns of the tiles of every image, which follow one another in
        `pixel_values`; an image of several tiles is followed by the whole image as a tile
        (LLaVA-NeXT: every image follows its whole).
      image_sizes: (height, width) in px of every image: LLaVA-NeXT, before its resize; Pixtral,
        after it, in `pixel_values` of the largest height and width.
      batch_num_images: LLaVA-OneVision: number of images of every row that has any. Several images
        of a row are not cut into tiles.
    """

    pixel_values: np.ndarray
    grids: np.ndarray | None = None
    aspect_ratio_ids: np.ndarray | None = None
    aspect_ratio_mask: np.ndarray | None = None
    num_tiles: list[list[int]] | None = None
    tile_grids: list[tuple[int, int]] | None = None
    image_sizes: list[tuple[int, int]] | None = None
    batch_num_images: list[int] | None = None


@dataclass(frozen=True)
class ImageProcessor:
    """The image preprocessing of a checkpoint."""

    settings: ImageSettings

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ImageProcessor":
        """Reads `processor_config.json`, `preprocessor_config.json` or `open_clip_config.json`.

        Raises:
          CheckpointError: none of them exists, or the first is not JSON or has an invalid setting.
        """
        return cls(read_settings(folder))

    def __call__(self, images: ImageInputs) -> ProcessedImages:
        """Processes one image, a list of images, or rows of images.

        Args:
          images: files, which are rotated upright, or open Pillow images or uint8 arrays
            (height, width, 3), which are not. Rows matter for mllama, where each is an example and
            a flat list is one, and for LLaVA-OneVision, where an image of a flat list is a row.

        Raises:
          CheckpointError: a file is not an image, or the images do not fit the settings or one
            another.
        """
        images = [images] if is_image(images) else images
        if self.settings.kind == "MllamaImageProcessor":
            rows = images if all(isinstance(row, list | tuple) for row in images) else [images]
            return ProcessedImages(**pack_tiles(rows, self.settings))
        if self.settings.kind == "FuyuImageProcessor":
            patches, grids = zip(*[_patches(image, self.settings) for image in _flat(images)])
            return ProcessedImages(np.concatenate(patches), grids=np.array(grids, np.int32))
        if self.settings.kind == "Siglip2ImageProcessor":
            patches, grids = zip(*[_padded_patches(x, self.settings) for x in _flat(images)])
            return ProcessedImages(np.stack(patches), grids=np.array(grids, np.int32))
        if self.settings.kind == QWEN2_VL:
            patches, grids = zip(*[_native(image, self.settings) for image in _flat(images)])
            return ProcessedImages(np.concatenate(patches), grids=np.array(grids, np.int32))
        if self.settings.kind == PIXTRAL:
            return _padded(_flat(images), self.settings)
        if self.settings.kind in TILE_CUTTERS:
            return self._cut([row if isinstance(row, list | tuple) else [row] for row in images])
        to_pixels = _open_clip if self.settings.kind == OPEN_CLIP else _pixels
        pixels = [to_pixels(image, self.settings) for image in _flat(images)]
        return ProcessedImages(_stack(pixels, self.settings))

    def _cut(self, rows: Sequence[Sequence[ImageInput]]) -> ProcessedImages:
        """Cuts images into tiles, each an image of its own to the encoder."""
        settings = self.settings
        cut = TILE_CUTTERS[settings.kind]
        cut_several = CUTTERS_OF_SEVERAL.get(settings.kind, cut)
        pixels, grids, sizes = [], [], []
        for row in rows:
            for image in row:
                rgb = to_rgb(image, settings)
                tiles = (cut if len(row) == 1 else cut_several)(rgb, settings)
                pixels += [to_values(tile, settings) for tile in tiles.images]
                grids.append(tiles.grid)
                sizes.append((rgb.height, rgb.width))
        counts = [len(row) for row in rows if row]
        return ProcessedImages(
            np.stack(pixels),
            tile_grids=grids,
            image_sizes=sizes if settings.kind in LLAVA_NEXT else None,
            batch_num_images=counts if settings.kind in CUTTERS_OF_SEVERAL else None,
        )


def _flat(images) -> Iterator[ImageInput]:
    for item in images:
        yield from item if isinstance(item, list | tuple) else [item]


def _pixels(image: ImageInput, settings: ImageSettings) -> np.ndarray:
    rgb = to_rgb(image, settings)
    if settings.pads_to_square:
        rgb = pad_to_square(rgb, tuple(int(mean * 255) for mean in settings.image_mean))
    if settings.do_resize:
        shape = resized_shape(rgb.height, rgb.width, settings.size)
        if settings.resizes_before_rounding:
            return to_values(resize_unrounded(rgb, shape, settings.resample), settings)
        rgb = resize(rgb, shape, settings.resample)
    if settings.do_center_crop:
        rgb = center_crop(rgb, settings.crop_size)
    return to_values(rgb, settings)


def _open_clip(image: ImageInput, settings: ImageSettings) -> np.ndarray:
    """Resizes in the image's own mode before converting to RGB, and rounds the crop to even."""
    pil = read(image)
    shape = resized_shape(pil.height, pil.width, settings.size)
    pil = resize(pil, shape, settings.resample)
    if settings.do_center_crop:
        pil = center_crop(pil, settings.crop_size, round_margin=round)
    return to_values(pil.convert("RGB"), settings)


def _patches(image: ImageInput, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns Fuyu's patches (P, C) and their (rows, columns).

    The last row and column of patches are filled up with padding.
    """
    rgb = to_rgb(image, settings)
    if settings.do_resize:
        shape = fitting_shape(rgb.height, rgb.width, settings.size)
        rgb = resize(rgb, shape, settings.resample)
    pixels = np.asarray(rgb)
    if settings.do_pad:
        shape = [settings.size[side] for side in SQUARE]
        pixels = pad(pixels, shape, settings.padding_mode, settings.padding_value)
    patch_height, patch_width = settings.patch_size
    grid = (math.ceil(rgb.height / patch_height), math.ceil(rgb.width / patch_width))
    height, width = grid[0] * patch_height, grid[1] * patch_width
    if height > len(pixels) or width > len(pixels[0]):
        raise CheckpointError(
            f"an image of {len(pixels)} x {len(pixels[0])} px cannot be cut into patches of "
            f"{settings.patch_size}: size must be a multiple of patch_size, with do_pad."
        )
    return _cut_patches(to_values(pixels[:height, :width], settings), grid), grid


def _padded_patches(
    image: ImageInput, settings: ImageSettings
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns SigLIP 2's patches (P, C), padded with zeros, and their (rows, columns)."""
    rgb, (side, _) = to_rgb(image, settings), settings.patch_size
    grid = fitting_grid(rgb.height, rgb.width, side, settings.max_num_patches)
    rgb = resize(rgb, (grid[0] * side, grid[1] * side), settings.resample)
    patches = _cut_patches(to_values(rgb, settings), grid)
    return np.pad(patches, ((0, settings.max_num_patches - len(patches)), (0, 0))), grid


def _padded(images: Iterable[ImageInput], settings: ImageSettings) -> ProcessedImages:
    """Pixtral's images, shrunk to whole squares of patches; zeros are below and to the right."""
    unit = settings.patch_size[0] * settings.merge_size
    limits = settings.size.get("longest_edge")
    limits = (limits, limits) if limits else tuple(settings.size[side] for side in SQUARE)
    pixels = []
    for image in images:
        rgb = to_rgb(image, settings)
        shape = shape_in_units(rgb.height, rgb.width, unit, limits)
        if min(shape) < 1:
            raise CheckpointError(
                f"an image of {rgb.width} x {rgb.height} px is too long for {limits[1]} x "
                f"{limits[0]} px: its shorter side would vanish."
            )
        pixels.append(to_values(resize(rgb, shape, settings.resample), settings))
    sizes = [image.shape[:2] for image in pixels]
    largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    return ProcessedImages(np.stack([pad(image, largest) for image in pixels]), image_sizes=sizes)


def _cut_patches(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) -> (P, C), row by row."""
    return einops.rearrange(pixels, "(r p) (c q) d -> (r c) (p q d)", r=grid[0], c=grid[1])


def _native(image: ImageInput, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns Qwen2-VL's patches (P, C) and their (rows, columns); every frame is the image."""
    rgb, patch = to_rgb(image, settings), settings.patch_size[0]
    unit = patch * settings.merge_size
    if settings.do_resize:
        aspect = max(rgb.size) / min(rgb.size)
        if aspect > native.MAX_ASPECT:
            raise CheckpointError(
                f"an image of {rgb.width} x {rgb.height} px is too long: its aspect ratio must be "
                f"at most {native.MAX_ASPECT}."
            )
        limits = settings.size["longest_edge"], settings.size["shortest_edge"]
        shape = native.fitting_shape(rgb.height, rgb.width, unit, *limits)
        rgb = resize(rgb, shape, settings.resample)
    elif rgb.height % unit or rgb.width % unit:
        raise CheckpointError(
            f"an image of {rgb.width} x {rgb.height} px is not made of squares of {unit} px: set "
            "do_resize."
        )
    patches = native.to_patches(to_values(rgb, settings), patch, settings.merge_size)
    patches = einops.repeat(
        patches, "P (p q c) -> P (c t p q)", p=patch, q=patch, t=settings.temporal_patch_size
    )
    return patches, (rgb.height // patch, rgb.width // patch)


def _stack(images: list[np.ndarray], settings: ImageSettings) -> np.ndarray:
    if settings.do_pad and not settings.pads_to_square:
        height = max(image.shape[0] for image in images)
        width = max(image.shape[1] for image in images)
        images = [pad(image, settings.pad_size or (height, width)) for image in images]
    shapes = sorted({image.shape[:2] for image in images})
    if len(shapes) > 1:
        raise CheckpointError(
            f"images of a batch get different sizes, {shapes}: process them one by one, or set "
            "do_pad."
        )
    return np.stack(images)
