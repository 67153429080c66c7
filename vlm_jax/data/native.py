"""Images at native resolution: their size in patches, packing, and positions of their tokens."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import einops
import numpy as np

from vlm_jax.config import Vision
from vlm_jax.config.tile_maps import Shape
from vlm_jax.structs import PADDING

MAX_ASPECT = 200  # of an image: a longer one has no sensible size in patches
# The squares of a row of prompts are padded to a multiple of it: fewer shapes are compiled.
SQUARES_MULTIPLE = 16


class PackedPatches(NamedTuple):
    """Fields of `Batch` with the images of some rows."""

    images: np.ndarray  # (B, P, C) float32
    patch_images: np.ndarray  # (B, P) int32
    patch_places: np.ndarray  # (B, P, 2) int32


def fitting_shape(
    height: int, width: int, unit: int, max_area: int, min_area: int = 0
) -> tuple[int, int]:
    """Returns the (height, width) in multiples of `unit` nearest to a size, within an area.

    The aspect is nearly kept. Source: transformers, `smart_resize` of models/qwen2_vl.
    """
    new_height, new_width = round(height / unit) * unit, round(width / unit) * unit
    if new_height * new_width > max_area:
        scale = math.sqrt(height * width / max_area)
        new_height = max(unit, math.floor(height / scale / unit) * unit)
        new_width = max(unit, math.floor(width / scale / unit) * unit)
    elif new_height * new_width < min_area:
        scale = math.sqrt(min_area / (height * width))
        new_height = math.ceil(height * scale / unit) * unit
        new_width = math.ceil(width * scale / unit) * unit
    return new_height, new_width


def resized_shape(height: int, width: int, vision: Vision) -> Shape:
    """Returns the (height, width) in px of an image in whole squares, at most `max_squares`."""
    unit, most = vision.square_px, vision.max_squares
    new_height, new_width = fitting_shape(height, width, unit, most * unit**2, unit**2)
    # An image that is long and thin has at least one row or column.
    rows = min(new_height // unit, most)
    columns = min(new_width // unit, most // rows)
    return rows * unit, columns * unit


def token_grid(image: Shape, vision: Vision) -> Shape:
    """Returns the rows and columns of the tokens of an image of (height, width) px."""
    return image[0] // vision.square_px, image[1] // vision.square_px


def longest_image(vision: Vision) -> Shape:
    """Returns the (height, width) in px of an image with the most tokens, and newlines between."""
    return vision.max_squares * vision.square_px, vision.square_px


def to_patches(image: np.ndarray, patch_size_px: int, square: int) -> np.ndarray:
    """(height, width, channels) -> patches (P, C), in the order of `patch_places`."""
    return einops.rearrange(
        image,
        "(h f p) (w g q) c -> (h w f g) (p q c)",
        p=patch_size_px,
        q=patch_size_px,
        f=square,
        g=square,
    )


def patch_places(grid: tuple[int, int], square: int) -> np.ndarray:
    """Row and column of each patch of a grid, (P, 2) int32, square by square of the projector."""
    f = square
    places = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1)  # (rows, columns, 2)
    return einops.rearrange(places, "(h f) (w g) a -> (h w f g) a", f=f, g=f).astype(np.int32)


def count_squares(image: Shape, vision: Vision) -> int:
    """Returns the number of tokens of an image of (height, width) px."""
    return math.prod(token_grid(image, vision))


def padded_length(patches: int, square: int) -> int:
    """Returns P of a batch of prompts with at most this many patches in a row."""
    return patches + -patches % (SQUARES_MULTIPLE * square**2)


def halve(most: int, needed: int) -> int:
    """Returns `most`, halved as often as `needed` allows: batches then have few lengths."""
    while needed <= -(-most // 2) < most:
        most = -(-most // 2)
    return most


def pack(
    rows: Sequence[Sequence[np.ndarray]],
    grids: Sequence[Sequence[tuple[int, int]]],
    square: int,
    length: int | None = None,
    dims: int | None = None,
) -> PackedPatches:
    """Packs the patches of the images of each row, one image after another.

    Args:
      rows: patches (P, C) of each image of each row.
      grids: rows and columns of patches of each.
      square: side of the squares that the projector merges.
      length: P; None: of the longest row.
      dims: C; None: of the first patches.
    """
    counts = [sum(map(len, row)) for row in rows]
    length = max(counts) if length is None else length
    if dims is None:
        dims = next(patches.shape[1] for row in rows for patches in row)
    images = np.zeros((len(rows), length, dims), np.float32)
    ids = np.full((len(rows), length), PADDING, np.int32)
    places = np.zeros((len(rows), length, 2), np.int32)
    for row, (row_patches, row_grids) in enumerate(zip(rows, grids, strict=True)):
        start = 0
        for number, (patches, grid) in enumerate(zip(row_patches, row_grids, strict=True), 1):
            slots = slice(start, start + len(patches))
            images[row, slots] = patches
            ids[row, slots] = number
            places[row, slots] = patch_places(grid, square)
            start += len(patches)
    return PackedPatches(images, ids, places)


def pack_images(rows: Sequence[Sequence[np.ndarray]], vision: Vision, length: int) -> PackedPatches:
    """Packs images of each row, (height, width, 3) float32, normalized, of `resized_shape`.

    Args:
      length: P.
    """
    square, side = vision.patch_square, vision.patch_size_px
    patches, grids = [], []
    for row in rows:
        patches.append([to_patches(image, side, square) for image in row])
        grids.append([(image.shape[0] // side, image.shape[1] // side) for image in row])
    return pack(patches, grids, square, length, vision.patch_dim)


def unpack(
    patches: np.ndarray, images: np.ndarray, places: np.ndarray, patch_size_px: int
) -> list[np.ndarray]:
    """Returns the images (height, width, channels) of a row of `PackedPatches`, in order."""
    unpacked = []
    for number in range(1, int(images.max(initial=0)) + 1):
        own = images == number
        if not own.any():
            continue
        rows, columns = places[own].max(axis=0) + 1
        grid = np.zeros((rows, columns, patches.shape[-1]), patches.dtype)
        grid[tuple(places[own].T)] = patches[own]
        p = patch_size_px
        unpacked.append(einops.rearrange(grid, "h w (p q c) -> (h p) (w q) c", p=p, q=p))
    return unpacked


def rope_positions(images: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Time, row and column of the tokens of a text with images (M-RoPE; Qwen2-VL, section 2.1).

    A token of text has the same number thrice. An image begins at the next number, from which its
    rows and columns count; the text after it continues from its longer side. Drawn for an image of
    1 x 3 tokens between two tokens of text:

        time     0  1 1 1  4
        row      0  1 1 1  4
        column   0  1 2 3  4

    Args:
      images: (N,) the image of each token, from 1, or 0 for text.
      grids: rows and columns of the tokens of each image.

    Returns:
      (N, 3) int32.
    """
    steps = np.ones(len(images), np.int32)
    offsets = np.zeros((len(images), 3), np.int32)
    for number, (rows, columns) in enumerate(grids, 1):
        (slots,) = np.nonzero(images == number)
        if not slots.size:
            continue
        steps[slots] = 0
        steps[slots[-1]] = max(rows, columns)
        offsets[slots, 1], offsets[slots, 2] = np.divmod(np.arange(len(slots)), columns)
    starts = np.cumsum(steps) - steps
    return (starts[:, None] + offsets).astype(np.int32)
