"""Images in tiles: any image as a grid of squares and a thumbnail, each of them an ordinary image to the encoder.

    +---+---+---+        +---+ +---+ +---+ +---+ +---+ +---+ +---+
    | 1 | 2 | 3 |   ->   | 1 | | 2 | | 3 | | 4 | | 5 | | 6 | |all|     views of an image, J = tiles + 1
    +---+---+---+        +---+ +---+ +---+ +---+ +---+ +---+ +---+
    | 4 | 5 | 6 |
    +---+---+---+

The rule that picks the grid is that of InternVL 1.5 (Chen et al. 2024, section 3.3), which NVLM took over. An image of
one tile has no thumbnail: it is one. Views that are not there are grey; no token stands for them or reads them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import einops
import numpy as np
from PIL import Image

from vlm_jax.config import CHANNELS, Vision
from vlm_jax.data.images import fit, normalise
from vlm_jax.data.resize import resize, to_square

CACHE_BYTES = (
    512 << 20
)  # decoded images kept in memory: to read and decode a small one takes 0.3 ms of a core


def layouts(most: int) -> list[tuple[int, int]]:
    """All (rows, columns) of at most so many tiles."""
    counts = range(1, most + 1)
    return [(rows, columns) for rows in counts for columns in counts if rows * columns <= most]


def best_layout(width: int, height: int, vision: Vision) -> tuple[int, int]:
    """The (rows, columns) for an image of so many pixels.

    Of all with at most `vision.tiles` tiles the one whose shape is the nearest; of those equally near the one with the
    most tiles of which the image fills more than half (`find_closest_aspect_ratio` of OpenGVLab/InternVL, with the
    order of transformers, models/got_ocr2/image_processing_got_ocr2.py, where two have as many tiles).
    """
    chosen, nearest = (1, 1), math.inf
    for rows, columns in sorted(
        layouts(vision.cut_tiles), key=lambda layout: (math.prod(layout), layout[1])
    ):
        off = abs(width / height - columns / rows)
        is_filled = width * height > 0.5 * rows * columns * vision.image_size_px**2
        if off < nearest or (off == nearest and is_filled):
            chosen, nearest = (rows, columns), off
    return chosen


def tile_count(width: int, height: int, vision: Vision) -> int:
    """Tiles of an image of so many pixels, from 1 to `vision.tiles`."""
    return math.prod(best_layout(width, height, vision))


def best_canvas(height: int, width: int, max_tiles: int, tile_px: int) -> tuple[int, int]:
    """The (rows, columns) of tiles that enlarge an image least, or else shrink it least; of equals, the fewest.

    Source: transformers, `get_optimal_tiled_canvas` of models/mllama/image_processing_mllama.py.
    """

    def scale(layout):
        return min(layout[0] * tile_px / height, layout[1] * tile_px / width)

    scales = [scale(layout) for layout in layouts(max_tiles)]
    chosen = min((s for s in scales if s >= 1), default=max(scales))
    return min((layout for layout in layouts(max_tiles) if scale(layout) == chosen), key=math.prod)


def shape_on_canvas(
    height: int, width: int, canvas: tuple[int, int], tile_px: int
) -> tuple[int, int]:
    """The (height, width) of an image on its canvas: a side grows to at most a tile, or shrinks to the canvas."""
    most_rows = min(max(height, tile_px), canvas[0])
    most_columns = min(max(width, tile_px), canvas[1])
    scale_rows, scale_columns = most_rows / height, most_columns / width
    if scale_columns < scale_rows:
        return min(math.floor(height * scale_columns), most_rows), most_columns
    return most_rows, min(math.floor(width * scale_rows), most_columns)


def fit_on_canvas(image: Image.Image, vision: Vision) -> np.ndarray:
    """An RGB image -> (rows * image_size_px, columns * image_size_px, 3) uint8, on the canvas that fits it best.

    The aspect ratio is kept; the right and lower borders are black (Llama 3.2 Vision).
    """
    side = vision.image_size_px
    rows, columns = best_canvas(image.height, image.width, vision.tiles, side)
    canvas = rows * side, columns * side
    shape = shape_on_canvas(image.height, image.width, canvas, side)
    pixels = np.asarray(resize(image, shape, Image.Resampling[vision.resample.upper()]))
    below, right = (whole - part for whole, part in zip(canvas, pixels.shape))
    return np.pad(pixels, ((0, below), (0, right), (0, 0)))


def resize_to_grid(image: Image.Image, vision: Vision) -> np.ndarray:
    """Any RGB image -> (rows * image_size_px, columns * image_size_px, 3) uint8: resized to its best layout."""
    if vision.keeps_aspect_in_tiles:
        return fit_on_canvas(image, vision)
    if vision.cut_tiles > 1:
        return fit(image, vision.image_size_px, best_layout(*image.size, vision), vision.resample)
    return np.asarray(to_square(image, vision))


def lru_cached(read: Callable[[int], Any], vision: Vision) -> Callable[[int], Any]:
    """What `read` gives for a number, something with an image that is laid out; those read last stay in memory."""
    most_bytes = CHANNELS * vision.cut_tiles * vision.image_size_px**2
    return functools.lru_cache(CACHE_BYTES // most_bytes)(read)


def to_pixels(image: Image.Image, vision: Vision) -> np.ndarray:
    """The same as float32, as the encoder reads it."""
    return normalise(resize_to_grid(image, vision), vision)


def grid_shape(pixels: np.ndarray, vision: Vision) -> tuple[int, int]:
    """The rows and columns of tiles of an image that is laid out."""
    height, width = pixels.shape[:2]
    return height // vision.image_size_px, width // vision.image_size_px


def count_tiles(pixels: np.ndarray, vision: Vision) -> int:
    """The number of tiles of an image that is laid out."""
    return math.prod(grid_shape(pixels, vision))


def cut_tiles(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """An image that is laid out, (height, width, 3) -> its tiles row by row."""
    rows, columns = grid_shape(pixels, vision)
    return einops.rearrange(pixels, "(r h) (c w) d -> (r c) h w d", r=rows, c=columns)


def split_into_views(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """An image that is laid out, (height, width, 3) float32 -> its tiles row by row, then its thumbnail, if it has one.

    The thumbnail is the mean of rows x columns pixels.
    """
    tiles, (rows, columns) = cut_tiles(pixels, vision), grid_shape(pixels, vision)
    if len(tiles) == 1 or not vision.thumbnail:
        return tiles
    whole = einops.reduce(pixels, "(h r) (w c) d -> 1 h w d", "mean", r=rows, c=columns)
    return np.concatenate([tiles, whole])


def stack_views(images: Sequence[np.ndarray], vision: Vision) -> np.ndarray:
    """Images that are laid out -> all their views, (I * J, image_size_px, image_size_px, 3) float32."""
    side, filled = (
        vision.image_size_px,
        view_mask([count_tiles(pixels, vision) for pixels in images], vision),
    )
    views = np.zeros((len(filled), side, side, 3), np.float32)
    if len(images):
        views[filled] = np.concatenate([split_into_views(pixels, vision) for pixels in images])
    return views


def batch_views(images: Sequence[np.ndarray], vision: Vision) -> np.ndarray:
    """Images that are laid out, (height, width, 3) uint8 -> (B, J, image_size_px, image_size_px, 3), normalised.

    Those that are all of one size are normalised at once: NumPy lets other threads run meanwhile.
    """
    if vision.views == 1:
        return normalise(np.stack(images), vision)[:, None]
    return np.stack([stack_views([normalise(pixels, vision)], vision) for pixels in images])


def view_mask(tiles: Sequence[int], vision: Vision) -> np.ndarray:
    """The number of tiles of every image (0: it is missing) -> (I * J,) bool: which of all the views are there."""
    number, views = np.array(tiles, np.int32)[:, None], np.arange(vision.views)
    is_thumbnail = views >= vision.cut_tiles
    return np.where(is_thumbnail, number > 1, views < number).reshape(-1)


def tag_names(vision: Vision) -> list[str]:
    """The tag of each view, in words (Dai et al. 2024, NVLM, and its modeling_nvlm_d.py)."""
    names = [f"<tile_{number}>" for number in range(1, vision.cut_tiles + 1)]
    return (names + ["<tile_global_thumbnail>"])[: vision.views]
