"""Large images as a few square tiles (Llama 3.2 Vision; `transformers.models.mllama.image_processing_mllama`)."""

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


def to_tiles(picture: ImageInput, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture -> its tiles (tiles, height, width, 3), row by row, and their (rows, columns)."""
    image = to_rgb(picture, settings.do_convert_rgb)
    tile_px = settings.size["height"]
    rows, columns = best_canvas(image.height, image.width, settings.max_image_tiles, tile_px)
    canvas = (rows * tile_px, columns * tile_px)
    image = resize(
        image, shape_on_canvas(image.height, image.width, canvas, tile_px), settings.resample
    )
    pixels = to_values(pad(np.asarray(image), canvas), settings)
    return einops.rearrange(pixels, "(r h) (c w) d -> (r c) h w d", r=rows, c=columns), (
        rows,
        columns,
    )


def pack_tiles(batch: Sequence[Sequence[ImageInput]], settings: ImageSettings) -> dict:
    """Rows of pictures -> arrays as wide as the row with the most images and as deep as the most tiles.

    Returns:
      pixel_values (B, I, J, height, width, 3) float32: 0 where there is no tile;
      aspect_ratio_ids (B, I) int32: the place of the layout in `layouts`, from 1; 0: no image;
      aspect_ratio_mask (B, I, J) int32: 1 where there is a tile, and at the first tile of a missing image too;
      num_tiles: the number of tiles of every image, in lists of B rows.
    """
    # The place in the list of layouts, from 1, is the aspect ratio id.
    ids_of = {
        layout: number for number, layout in enumerate(layouts(settings.max_image_tiles), start=1)
    }
    shape = (len(batch), max(map(len, batch), default=0), settings.max_image_tiles)
    values = np.zeros((*shape, *settings.size.values(), 3), np.float32)
    ids, mask = np.zeros(shape[:2], np.int32), np.zeros(shape, np.int32)
    mask[..., 0] = 1
    for b, row in enumerate(batch):
        for i, picture in enumerate(row):
            tiles, layout = to_tiles(picture, settings)
            values[b, i, : len(tiles)], mask[b, i, : len(tiles)], ids[b, i] = (
                tiles,
                1,
                ids_of[layout],
            )
    num_tiles = [mask[b, : len(row)].sum(axis=-1).tolist() for b, row in enumerate(batch)]
    return {
        "pixel_values": values,
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": mask,
        "num_tiles": num_tiles,
    }
