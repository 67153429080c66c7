"""Splits images into tiles: squares and a thumbnail, each an ordinary image to the encoder.

    +---+---+---+        +---+ +---+ +---+ +---+ +---+ +---+ +---+     views of an
    | 1 | 2 | 3 |   ->   | 1 | | 2 | | 3 | | 4 | | 5 | | 6 | |all|     image,
    +---+---+---+        +---+ +---+ +---+ +---+ +---+ +---+ +---+     J = tiles + 1
    | 4 | 5 | 6 |
    +---+---+---+

The grid is chosen as in InternVL 1.5 (Chen et al. 2024, section 3.3) and NVLM. An image of one tile
has no thumbnail. Missing views are gray; they have no tokens, and no token reads them.

With `vision.tile_grids` the grid is chosen as in LLaVA-NeXT, every image has a thumbnail, and an
image that keeps its aspect ratio (`vision.resize` pad) is padded when it is cut.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import einops
import numpy as np
from PIL import Image

from vlm_jax.config import CHANNELS, Vision
from vlm_jax.config.tile_maps import Shape, choose_grid, fitted_shape
from vlm_jax.data import native
from vlm_jax.data.images import fit, normalize
from vlm_jax.data.resize import resize, to_square

# Decoded images kept in memory. Reading and decoding a small one takes 0.3 ms of a core.
CACHE_BYTES = 512 << 20

# The number of tiles of an image; with `vision.tile_grids` and at native resolution the (height,
# width) in px of the image from `resize_to_grid`, on which its tokens depend. A number is then an
# image with its tiles in a row, or the image with the most tokens.
Tiles = int | Shape


def layouts(max_tiles: int) -> list[tuple[int, int]]:
    """Returns all (rows, columns) with at most `max_tiles` tiles."""
    counts = range(1, max_tiles + 1)
    return [(rows, columns) for rows in counts for columns in counts if rows * columns <= max_tiles]


def best_layout(width: int, height: int, vision: Vision) -> tuple[int, int]:
    """Returns the (rows, columns) of tiles for an image of `width` x `height` px.

    It has at most `vision.tiles` tiles (see `nearest_layout`), or is one of `vision.tile_grids`.
    """
    if vision.tile_grids:
        return choose_grid((height, width), vision.tile_grids, vision.image_size_px)
    return nearest_layout(width, height, 1, vision.cut_tiles, vision.image_size_px)


def nearest_layout(
    width: int, height: int, min_tiles: int, max_tiles: int, tile_px: int
) -> tuple[int, int]:
    """Returns the (rows, columns) with the aspect ratio nearest to the image's.

    Among equally near ones it is the largest layout that the image fills by more than half.

    Source: OpenGVLab/InternVL, `find_closest_aspect_ratio`, in the order of transformers,
    models/got_ocr2/image_processing_got_ocr2.py, for layouts with as many tiles.
    """
    best, smallest_difference = (1, 1), math.inf
    candidates = sorted(layouts(max_tiles), key=lambda layout: (math.prod(layout), layout[1]))
    for rows, columns in candidates:
        if rows * columns < min_tiles:
            continue
        difference = abs(width / height - columns / rows)
        is_filled = width * height > 0.5 * rows * columns * tile_px**2
        is_tie = difference == smallest_difference
        if difference < smallest_difference or (is_tie and is_filled):
            best, smallest_difference = (rows, columns), difference
    return best


def tile_count(width: int, height: int, vision: Vision) -> int:
    """Returns the number of tiles of an image of `width` x `height` px: 1 to `vision.tiles`."""
    return math.prod(best_layout(width, height, vision))


def best_canvas(height: int, width: int, max_tiles: int, tile_px: int) -> tuple[int, int]:
    """Returns the (rows, columns) of tiles that enlarge an image least, or else shrink it least.

    Among equals it has the fewest tiles.

    Source: transformers, `get_optimal_tiled_canvas` of models/mllama/image_processing_mllama.py.
    """

    def scale(layout):
        return min(layout[0] * tile_px / height, layout[1] * tile_px / width)

    candidates = layouts(max_tiles)
    scales = [scale(layout) for layout in candidates]
    best_scale = min((s for s in scales if s >= 1), default=max(scales))
    best = [layout for layout in candidates if scale(layout) == best_scale]
    return min(best, key=math.prod)


def shape_on_canvas(
    height: int, width: int, canvas: tuple[int, int], tile_px: int
) -> tuple[int, int]:
    """Returns the (height, width) of an image on its canvas.

    A side grows to at most a tile, or shrinks to the canvas.
    """
    max_height = min(max(height, tile_px), canvas[0])
    max_width = min(max(width, tile_px), canvas[1])
    scale_height, scale_width = max_height / height, max_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width), max_height), max_width
    return max_height, min(math.floor(width * scale_height), max_width)


def fit_on_canvas(image: Image.Image, vision: Vision) -> np.ndarray:
    """Resizes an RGB image to the canvas of tiles that fits it best.

    The aspect ratio is kept; the right and lower borders are black (Llama 3.2 Vision).

    Returns:
      (rows * image_size_px, columns * image_size_px, 3) uint8.
    """
    side = vision.image_size_px
    rows, columns = best_canvas(image.height, image.width, vision.tiles, side)
    canvas = rows * side, columns * side
    shape = shape_on_canvas(image.height, image.width, canvas, side)
    pixels = np.asarray(resize(image, shape, Image.Resampling[vision.resample.upper()]))
    below = canvas[0] - pixels.shape[0]
    right = canvas[1] - pixels.shape[1]
    return np.pad(pixels, ((0, below), (0, right), (0, 0)))


def shape_in_map(image: Shape, vision: Vision) -> Shape:
    """Returns the (height, width) in px of an image after its resize for `vision.tile_grids`."""
    rows, columns = choose_grid(image, vision.tile_grids, vision.image_size_px)
    canvas = rows * vision.image_size_px, columns * vision.image_size_px
    return fitted_shape(image, canvas) if vision.resize == "pad" else canvas


def resize_to_grid(image: Image.Image, vision: Vision) -> np.ndarray:
    """Resizes an RGB image to its grid of tiles.

    Returns:
      (rows * image_size_px, columns * image_size_px, 3) uint8; with `vision.tile_grids` and
      `vision.resize` pad less, without the padding.
    """
    if vision.is_native:
        shape = native.resized_shape(image.height, image.width, vision)
        return np.asarray(resize(image, shape, Image.Resampling[vision.resample.upper()]))
    if vision.keeps_aspect_in_tiles:
        return fit_on_canvas(image, vision)
    if vision.tile_grids:
        shape = shape_in_map((image.height, image.width), vision)
        return np.asarray(resize(image, shape, Image.Resampling[vision.resample.upper()]))
    if vision.cut_tiles > 1:
        return fit(image, vision.image_size_px, best_layout(*image.size, vision), vision.resample)
    return np.asarray(to_square(image, vision))


def lru_cached(read: Callable[[int], Any], vision: Vision, caches: int = 1) -> Callable[[int], Any]:
    """Returns `read` behind an LRU cache, if it returns one image of `vision`.

    Args:
      caches: number of caches that share CACHE_BYTES.
    """
    max_image_bytes = CHANNELS * vision.cut_tiles * vision.image_size_px**2
    if vision.is_native:
        max_image_bytes = vision.max_squares * CHANNELS * vision.square_px**2
    return functools.lru_cache(CACHE_BYTES // max_image_bytes // caches)(read)


def to_pixels(image: Image.Image, vision: Vision) -> np.ndarray:
    """Resizes an RGB image to its grid of tiles and normalizes it, to float32."""
    return normalize(resize_to_grid(image, vision), vision)


def grid_shape(pixels: np.ndarray, vision: Vision) -> tuple[int, int]:
    """Returns the rows and columns of tiles of an image from `resize_to_grid`."""
    height, width = pixels.shape[:2]
    if vision.tile_grids:
        # The resized image gets the grid that it was resized for.
        return choose_grid((height, width), vision.tile_grids, vision.image_size_px)
    return height // vision.image_size_px, width // vision.image_size_px


def count_tiles(pixels: np.ndarray, vision: Vision) -> int:
    """Returns the number of tiles of an image from `resize_to_grid`."""
    return math.prod(grid_shape(pixels, vision))


def describe_tiles(pixels: np.ndarray, vision: Vision) -> Tiles:
    """Returns the tiles of an image from `resize_to_grid`."""
    has_shape = vision.tile_grids or vision.is_native
    return pixels.shape[:2] if has_shape else count_tiles(pixels, vision)


def predict_tiles(width: int, height: int, vision: Vision) -> Tiles:
    """Returns the tiles of an image of `width` x `height` px before it is resized."""
    if vision.is_native:
        return native.resized_shape(height, width, vision)
    if vision.tile_grids:
        return shape_in_map((height, width), vision)
    return tile_count(width, height, vision)


def shape_of_tiles(tiles: Tiles, vision: Vision) -> Shape:
    """Returns the (height, width) in px that `tiles` stands for, if they are more than a number."""
    if vision.is_native:
        return native.longest_image(vision) if isinstance(tiles, int) else tiles
    side = vision.image_size_px
    return (side, side * tiles) if isinstance(tiles, int) else tiles


def cut_tiles(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """Cuts an image from `resize_to_grid`, (height, width, 3), into its tiles, row by row."""
    rows, columns = grid_shape(pixels, vision)
    return einops.rearrange(pixels, "(r h) (c w) d -> (r c) h w d", r=rows, c=columns)


def split_into_views(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """Splits an image from `resize_to_grid` into its tiles and, if it has one, its thumbnail.

    A pixel of the thumbnail is the mean of rows x columns pixels; with `vision.tile_grids` it is
    interpolated.

    Args:
      pixels: (height, width, 3) float32.
      vision: the size of a tile.
    """
    if vision.tile_grids:
        tiles = cut_tiles(pad_to_grid(pixels, vision), vision)
        return np.concatenate([tiles, squash(pixels, vision)[None]]) if vision.thumbnail else tiles
    tiles = cut_tiles(pixels, vision)
    if len(tiles) == 1 or not vision.thumbnail:
        return tiles
    rows, columns = grid_shape(pixels, vision)
    whole = einops.reduce(pixels, "(h r) (w c) d -> 1 h w d", "mean", r=rows, c=columns)
    return np.concatenate([tiles, whole])


def pad_to_grid(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """Centers a normalized image on the black canvas of its tiles (LLaVA-NeXT)."""
    height, width = pixels.shape[:2]
    rows, columns = grid_shape(pixels, vision)
    shape = rows * vision.image_size_px, columns * vision.image_size_px, CHANNELS
    canvas = normalize(np.zeros(shape, np.uint8), vision)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def squash(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """Resizes (height, width, 3) float32 to one square, whatever the aspect ratio."""
    side, resample = vision.image_size_px, Image.Resampling[vision.resample.upper()]
    channels = [
        Image.fromarray(channel).resize((side, side), resample)
        for channel in np.moveaxis(pixels, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def stack_views(images: Sequence[np.ndarray], vision: Vision) -> np.ndarray:
    """Splits images from `resize_to_grid` into views; missing views are zero.

    Returns:
      (I, image_size_px, image_size_px, 3) float32, I = images * J.
    """
    side = vision.image_size_px
    is_view = view_mask([describe_tiles(pixels, vision) for pixels in images], vision)
    views = np.zeros((len(is_view), side, side, 3), np.float32)
    if len(images):
        views[is_view] = np.concatenate([split_into_views(pixels, vision) for pixels in images])
    return views


def batch_views(images: Sequence[np.ndarray], vision: Vision) -> np.ndarray:
    """Normalizes a batch of images from `resize_to_grid`, (height, width, 3) uint8.

    Returns:
      (B, J, image_size_px, image_size_px, 3) float32.
    """
    if vision.views == 1 and not vision.tile_grids:
        # Images of one size are normalized at once: NumPy lets other threads run meanwhile.
        return normalize(np.stack(images), vision)[:, None]
    return np.stack([stack_views([normalize(pixels, vision)], vision) for pixels in images])


def view_mask(tiles: Sequence[Tiles], vision: Vision) -> np.ndarray:
    """Returns (I,) bool, I = images * J: False for missing views.

    `tiles` has the tiles of each image; 0 is a missing image.
    """
    if vision.is_native:
        tiles = [int(tiles_of_image != 0) for tiles_of_image in tiles]
    if vision.tile_grids:
        tiles = [_count_in_map(tiles_of_image, vision) for tiles_of_image in tiles]
    tile_counts = np.array(tiles, np.int32)[:, None]  # (images, 1)
    views = np.arange(vision.views)  # (J,)
    is_thumbnail = views >= vision.cut_tiles
    has_thumbnail = tile_counts >= vision.least_tiles
    return np.where(is_thumbnail, has_thumbnail, views < tile_counts).reshape(-1)


def _count_in_map(tiles: Tiles, vision: Vision) -> int:
    if not tiles:
        return 0
    shape = shape_of_tiles(tiles, vision)
    return math.prod(choose_grid(shape, vision.tile_grids, vision.image_size_px))


def tag_names(vision: Vision) -> list[str]:
    """Returns the tag of each view as text (Dai et al. 2024, NVLM, and its modeling_nvlm_d.py)."""
    names = [f"<tile_{number}>" for number in range(1, vision.cut_tiles + 1)]
    return [*names, "<tile_global_thumbnail>"][: vision.views]
