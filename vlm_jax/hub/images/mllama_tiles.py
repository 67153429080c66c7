"""Cuts large images into square tiles, as Llama 3.2 Vision does.

Reference: `transformers.models.mllama.image_processing_mllama`.
"""

from collections.abc import Sequence

import einops
import numpy as np

from vlm_jax.data.resize import resize
from vlm_jax.data.tiling import best_canvas, layouts, shape_on_canvas
from vlm_jax.hub.images.settings import ImageSettings
from vlm_jax.hub.images.steps import (
    ImageInput,
    pad,
    to_rgb,
    to_values,
)


def to_tiles(image: ImageInput, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the tiles (tiles, height, width, 3) of an image, row by row, and (rows, columns)."""
    rgb = to_rgb(image, settings)
    tile_px = settings.size["height"]
    rows, columns = best_canvas(rgb.height, rgb.width, settings.max_image_tiles, tile_px)
    canvas = (rows * tile_px, columns * tile_px)
    shape = shape_on_canvas(rgb.height, rgb.width, canvas, tile_px)
    resized = resize(rgb, shape, settings.resample)
    pixels = to_values(pad(np.asarray(resized), canvas), settings)
    tiles = einops.rearrange(pixels, "(r h) (c w) d -> (r c) h w d", r=rows, c=columns)
    return tiles, (rows, columns)


def pack_tiles(batch: Sequence[Sequence[ImageInput]], settings: ImageSettings) -> dict:
    """Pads rows of images to I images, the most of a row, of J tiles, the most of an image.

    Returns:
      pixel_values (B, I, J, height, width, 3) float32: 0 in blank tiles;
      aspect_ratio_ids (B, I) int32: position of the layout in `layouts`, from 1; 0: no image;
      aspect_ratio_mask (B, I, J) int32: 1 for a tile, and for the first tile of a missing image;
      num_tiles: number of tiles of every image, a list for each of the B rows.
    """
    layout_ids = {
        layout: number for number, layout in enumerate(layouts(settings.max_image_tiles), start=1)
    }
    max_images = max(map(len, batch), default=0)
    shape = (len(batch), max_images, settings.max_image_tiles)
    values = np.zeros((*shape, *settings.size.values(), 3), np.float32)
    ids, mask = np.zeros(shape[:2], np.int32), np.zeros(shape, np.int32)
    mask[..., 0] = 1
    for b, row in enumerate(batch):
        for i, image in enumerate(row):
            tiles, layout = to_tiles(image, settings)
            values[b, i, : len(tiles)] = tiles
            mask[b, i, : len(tiles)] = 1
            ids[b, i] = layout_ids[layout]
    return {
        "pixel_values": values,
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": mask,
        "num_tiles": [mask[b, : len(row)].sum(axis=-1).tolist() for b, row in enumerate(batch)],
    }
