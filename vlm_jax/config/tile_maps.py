"""Geometry of tile maps: the tokens of an image's tiles, put back together (`vision.tile_grids`).

An image of 2 x 1 tiles with 2 x 2 tokens each; it is narrower than its tiles (p: padding):

    +-----+        p a b p                  a b n
    |     |        p c d p    without       c d n     n: the learned vector
    +-----+   ->   p e f p    padding  ->   e f n
    |     |        p g h p                  g h n
    +-----+

Source: LLaVA-NeXT (Liu et al. 2024) and LLaVA-OneVision (Li et al. 2024, section 3.2) as in
transformers 5.23, `pack_image_features` of models/llava_next and models/llava_onevision.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax.config.model import Fusion, Projector, Vision

TAPS = 4  # image tokens that a token of a resized map is interpolated from
Shape = tuple[int, int]  # rows and columns, or height and width in px
RESIZE_RATIO = (
    1.1  # a map is resized if its sides exceed the largest map's by more than this factor
)


class TileMap(NamedTuple):
    """The map of one image, in tokens."""

    grid: Shape  # rows and columns of tiles
    top: int  # rows of padding above
    left: int  # columns of padding on the left
    rows: int  # without padding
    columns: int
    #: rows and columns after the resize; equal to `rows` and `columns` if there is none
    resized: Shape

    @property
    def length(self) -> int:
        """Number of tokens, with the vectors that end the rows."""
        rows, columns = self.resized
        return rows * (columns + 1)


def choose_grid(image: Shape, grids: Sequence[Shape], tile_px: int) -> Shape:
    """Returns the (rows, columns) of tiles on which most pixels of an image fit.

    Among equals it is the grid with the fewest tiles, and of these the first.

    Args:
      image: (height, width) in px.

    Source: transformers, `select_best_resolution` of image_processing_utils.py.
    """
    height, width = image

    def merit(grid: Shape) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * tile_px / width, rows * tile_px / height)
        kept_px = min(int(width * scale) * int(height * scale), width * height)
        return kept_px, -rows * columns

    return max(grids, key=merit)


def fitted_shape(image: Shape, canvas: Shape) -> Shape:
    """Returns the (height, width) of an image that is scaled to fit into a canvas, in px.

    Source: transformers, `get_patch_output_size` of image_processing_utils.py.
    """
    height, width = image
    scale_height, scale_width = canvas[0] / height, canvas[1] / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_height), canvas[1])


def make_tile_map(vision: Vision, projector: Projector, image: Shape) -> TileMap:
    """Returns the map of an image of (height, width) px."""
    view_rows, view_columns = projector.output_grid(vision)
    grid = choose_grid(image, vision.tile_grids, vision.image_size_px)
    rows, columns = grid[0] * view_rows, grid[1] * view_columns
    height, width = image
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    rows, columns = rows - 2 * top, columns - 2 * left
    resized = rows, columns
    if vision.max_map_tiles is not None:
        ratio = math.sqrt(rows * columns / (vision.max_map_tiles * view_rows * view_columns))
        if ratio > RESIZE_RATIO:
            resized = int(rows // ratio), int(columns // ratio)
    return TileMap(grid, top, left, rows, columns, resized)


def image_length(vision: Vision, projector: Projector, image: Shape) -> int:
    """Returns the number of tokens of an image of (height, width) px, thumbnail included."""
    whole = projector.num_tokens(vision) if vision.thumbnail else 0
    return whole + make_tile_map(vision, projector, image).length


def has_maps_in_sequence(vision: Vision, fusion: Fusion) -> bool:
    """Returns whether the tokens of a map are in the decoder's sequence."""
    return bool(vision.tile_grids) and fusion.image_in_sequence and not fusion.image_in_memory


def has_maps_in_memory(vision: Vision, fusion: Fusion) -> bool:
    """Returns whether the tokens of a map are keys and values of cross-attention."""
    return bool(vision.tile_grids) and fusion.image_in_memory


def has_thumbnail_in_memory(vision: Vision, fusion: Fusion) -> bool:
    """Returns whether the thumbnail precedes the map among the keys of cross-attention."""
    return vision.thumbnail and not fusion.splits_views


def map_memory_length(vision: Vision, projector: Projector, fusion: Fusion) -> int:
    """Returns the number of keys of an image with the most tokens, if a map is in memory."""
    length = image_length(vision, projector, longest_image(vision, projector))
    has_other_thumbnail = vision.thumbnail and not has_thumbnail_in_memory(vision, fusion)
    return length - projector.num_tokens(vision) if has_other_thumbnail else length


@functools.lru_cache
def longest_image(vision: Vision, projector: Projector) -> Shape:
    """Returns a (height, width) in px of images with the most tokens."""
    view_rows, view_columns = projector.output_grid(vision)
    images = []
    # Every number of rows and columns that padding may leave on each grid.
    for grid in vision.tile_grids:
        rows, columns = grid[0] * view_rows, grid[1] * view_columns
        height, width = grid[0] * vision.image_size_px, grid[1] * vision.image_size_px
        images += [(math.ceil(height * n / rows), width) for n in range(rows, 0, -1)]
        images += [(height, math.ceil(width * n / columns)) for n in range(columns, 0, -1)]
    return max(images, key=lambda image: image_length(vision, projector, image))
