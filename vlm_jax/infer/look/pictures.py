"""Images as the model sees them, in one piece, with maps on the same pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import einops
import numpy as np
from PIL import Image

from vlm_jax.config import ConfigError, Vision
from vlm_jax.data import native, tiling
from vlm_jax.hub.images.steps import ImageInput, PixelScale, read
from vlm_jax.infer.processor import Processor
from vlm_jax.structs import Batch

Layout = tuple[int, int]  # rows and columns of tiles
DARKEST = 0.15  # brightness of a pixel without attention, as a share of its own


@dataclass(frozen=True)
class Picture:
    """An image, resized and cropped as the model sees it, whose views are cut from it."""

    pixels: np.ndarray  # (height, width, 3) uint8
    layout: Layout
    first_view: int  # index of its first tile among the views of the row
    thumbnail: int | None  # index of its thumbnail; None: it has none
    #: at native resolution: its rows and columns of patches, in the upper left of the maps
    patches: tuple[int, int] | None = None

    def join(self, maps: np.ndarray) -> np.ndarray:
        """Joins maps of all views, (..., I, rows, columns), to maps of this image.

        A patch of the thumbnail is as large as layout[0] x layout[1] patches of the tiles, which
        share its weight.

        Returns:
          (..., layout[0] * rows, layout[1] * columns), with the sum of the views' maps; at native
          resolution its own rows and columns.
        """
        r, c = self.layout
        if self.patches is not None:
            rows, columns = self.patches
            return maps[..., self.first_view, :rows, :columns]
        tiles = maps[..., self.first_view : self.first_view + r * c, :, :]
        joined = einops.rearrange(tiles, "... (r c) h w -> ... (r h) (c w)", r=r, c=c)
        if self.thumbnail is not None:
            whole = maps[..., self.thumbnail, :, :] / (r * c)
            joined = joined + einops.repeat(whole, "... h w -> ... (h r) (w c)", r=r, c=c)
        return joined

    def shade(self, weights: np.ndarray) -> np.ndarray:
        """Darkens pixels with less attention than the maximum of a map (rows, columns).

        Returns:
          (height, width, 3) uint8.
        """
        height, width = self.pixels.shape[:2]
        relative = Image.fromarray((weights / max(weights.max(), 1e-30)).astype(np.float32))
        relative = np.asarray(relative.resize((width, height), Image.Resampling.BILINEAR))
        brightness = DARKEST + (1 - DARKEST) * relative
        return (self.pixels * brightness[..., None]).astype(np.uint8)


def image_layouts(
    vision: Vision, images: Sequence[ImageInput], processor: Processor
) -> list[Layout]:
    """Returns the tiles that each image is cut into; the encoder sees them separately."""
    grids = processor.tile_grids(images)
    if grids is not None:
        return grids
    if vision.cut_tiles == 1:
        return [(1, 1)] * len(images)
    return [tiling.best_layout(*read(image).size, vision) for image in images]


def join_views(
    vision: Vision, scale: PixelScale, batch: Batch, row: int, layouts: Sequence[Layout]
) -> list[Picture]:
    """Returns the images of a row of a batch.

    Args:
      layouts: of `image_layouts`. If the encoder sees the tiles together (Llama 3.2 Vision), the
        layouts of the batch are used. (0, 0): the image is its thumbnail alone.

    Raises:
      ConfigError: the batch has another number of images.
    """
    image_row = row if batch.image_rows is None else int(batch.image_rows[row])
    if vision.is_native:
        return _native_pictures(vision, scale, batch, image_row)
    pixels = scale.to_rgb(batch.images[image_row])
    per_image = vision.views
    if vision.tile_layouts:
        per_image = pixels.shape[1]  # J
        ids = [int(number) for number in batch.tile_layouts[image_row] if number]
        layouts = [vision.tile_layouts[number - 1] for number in ids]
        pixels = pixels.reshape(-1, *pixels.shape[2:])  # (I * J, height, width, 3)
    counts = [per_image] * len(layouts)
    own_counts = [r * c + _has_thumbnail(vision, (r, c)) for r, c in layouts]
    # A processor of maps of tiles leaves no room, settings do.
    if _is_cut_by_processor(vision) or (vision.tile_grids and len(pixels) == sum(own_counts)):
        counts = own_counts
    # A row with fewer images than others is filled up, but not within a single row.
    is_short = len(pixels) < sum(counts)
    if is_short or (len(batch.images) == 1 and len(pixels) > sum(counts)):
        raise ConfigError(f"{len(layouts)} layouts do not fit a batch of {len(pixels)} views.")
    pictures, first = [], 0
    for (r, c), count in zip(layouts, counts):
        last = first + count - 1
        if not r * c:
            pictures.append(Picture(pixels[first], (1, 1), first, None))
        else:
            tiles = pixels[first : first + r * c]
            whole = einops.rearrange(tiles, "(r c) h w d -> (r h) (c w) d", r=r, c=c)
            thumbnail = last if _has_thumbnail(vision, (r, c)) else None
            pictures.append(Picture(whole, (r, c), first, thumbnail))
        first += count
    return pictures


def _native_pictures(
    vision: Vision, scale: PixelScale, batch: Batch, image_row: int
) -> list[Picture]:
    """Returns the images of a row of images at native resolution."""
    fields = (batch.images, batch.patch_images, batch.patch_places)
    patches, images, places = [np.asarray(field)[image_row] for field in fields]
    pictures = []
    for number, image in enumerate(native.unpack(patches, images, places, vision.patch_size_px)):
        pictures.append(_native_picture(vision, scale.to_rgb(image), number))
    return pictures


def _native_picture(vision: Vision, pixels: np.ndarray, number: int) -> Picture:
    rows, columns = np.array(pixels.shape[:2]) // vision.patch_size_px
    return Picture(pixels, (1, 1), number, None, (int(rows), int(columns)))


def place_views(vision: Vision, pixels: np.ndarray, layout: Layout) -> Picture:
    """Returns the first image of a row of a run with the places of its views."""
    if vision.is_native:
        return _native_picture(vision, pixels, 0)
    thumbnail = vision.cut_tiles if _has_thumbnail(vision, layout) else None
    return Picture(pixels, layout, 0, thumbnail)


def _is_cut_by_processor(vision: Vision) -> bool:
    """Returns whether only the processor of a checkpoint can have cut an image into tiles."""
    return vision.views == 1 and not vision.tile_layouts


def _has_thumbnail(vision: Vision, layout: Layout) -> bool:
    """Returns whether an image of this layout has its whole as one more view."""
    has_room = vision.views > vision.cut_tiles or _is_cut_by_processor(vision)
    return has_room and (math.prod(layout) >= vision.least_tiles or not math.prod(layout))
