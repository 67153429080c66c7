"""Stacks rows and their images into a `Batch`."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from vlm_jax.config import Data, Experiment
from vlm_jax.config.tile_maps import (
    TAPS,
    has_maps_in_memory,
    has_thumbnail_in_memory,
    map_memory_length,
)
from vlm_jax.data import images as image_files
from vlm_jax.data import native, tiling
from vlm_jax.data.fields import Fields, count_native_tokens, map_tokens, offset_ids, restrict_tags
from vlm_jax.structs import (
    ANY_LAYOUT,
    NO_IMAGE,
    ONE_SEGMENT,
    PACKED,
    PADDING,
    Batch,
    MapMemory,
    of_token_rows,
)

NO_CONVERSATION = 0  # owner of an empty image slot

Reader = Callable[[Sequence[int]], Iterable[np.ndarray]]


@functools.lru_cache
def row_layout(data: Data) -> str:
    """Returns `Batch.layout` of training rows.

    Rows that may have several questions about their image have branches: any layout.
    """
    if data.is_conversations:
        return PACKED
    has_branches = any(part.questions_per_row > 1 for part in data.parts.values())
    return ANY_LAYOUT if has_branches else ONE_SEGMENT


def stack_fields(rows: Sequence[Fields], without: str | None = None) -> Fields:
    """Stacks each field of rows that have the same fields, except the field `without`."""
    stacked = {}
    for name in rows[0]:
        if name != without:
            stacked[name] = np.stack([row[name] for row in rows])
    return stacked


def to_batch(cfg: Experiment, rows: Sequence[Fields], read: Reader) -> Batch:
    """Makes a batch with all views of `data.images_per_row` images from rows of the packer.

    A token reads an image of its conversation (equal segment ids) if the image's position in the
    conversation is below the token's `images_seen`. Drawn for a row of two conversations,
    with one and two images of one token each (x: `image_mask` is True, without tiles):

        tokens                    <image> a b | c <image> d <image> e | <pad>
        tokens_segment_ids           1    1 1 | 2    2    2    2    2 |   0
        images_seen                  1    1 1 | 0    1    1    2    2 |   0      segment  position
        image slot 0                 x    x x | .    .    .    .    . |   .         1        0
        image slot 1                 .    . . | .    x    x    x    x |   .         2        0
        image slot 2                 .    . . | .    .    .    x    x |   .         2        1

    With `fusion.placeholder` the position must also reach the token's `images_from`.

    Args:
      cfg: the experiment.
      rows: fields of length S (of tokens) and of length data.images_per_row (of images).
      read: indices of images -> their pixels, (H, W, 3) uint8, resized to their grids of tiles.
    """
    fields = stack_fields(rows, without="id")
    # In the comments, i counts the images_per_row image slots of a row; J views each give I.
    segment_ids = fields["tokens_segment_ids"]  # (B, S)
    owners = fields["images_segment_ids"]  # (B, i)
    filled = owners != NO_CONVERSATION  # (B, i)
    is_own = (segment_ids[:, :, None] == owners[:, None, :]) & filled[:, None, :]  # (B, S, i)
    position = fields["images_positions"][:, None, :]  # (B, 1, i)
    is_read = is_own & (position < fields["images_seen"][:, :, None])  # (B, S, i)
    if cfg.fusion.placeholder:
        is_read &= position >= fields["images_from"][:, :, None]

    images, packed = None, {}
    image_mask = is_read
    if cfg.vision.is_native:
        pixels = _rows(_read_normalized(cfg, fields["images"], filled, read), len(filled))
        packed = native.pack_images(pixels, cfg.vision, cfg.patches_per_row)._asdict()
        images = packed.pop("images")
    elif not cfg.vision.keeps_aspect_in_tiles:
        stacked = _stack_images(cfg, fields["images"], filled, read)
        images, is_view, packed["map_memory"] = stacked  # (B, I, ...), (B, I)
        image_mask = np.repeat(is_read, cfg.vision.views, axis=-1) & is_view[:, None]  # (B, S, I)

    # Conversations count their views from 0; in the row they follow the views of the slots before.
    first_image = is_own.argmax(-1)  # (B, S)
    first_view = first_image * cfg.vision.views
    image_tags = offset_ids(fields["image_tags"], first_view)
    first_token = first_view * cfg.image_tokens
    if cfg.vision.is_native:
        starts = _first_tokens(cfg, pixels, filled.shape)
        first_token = np.take_along_axis(starts, first_image, axis=1)
    taps = fields.get("image_taps")
    batch = Batch(
        tokens=fields["tokens"],
        targets=fields["targets"],
        loss_weights=fields["loss_weights"],
        block_ids=fields.get("block_ids"),
        positions=fields["tokens_positions"],
        segment_ids=segment_ids,
        image_token_index=offset_ids(fields["image_token_index"], first_token),
        image_taps=None if taps is None else taps + first_token[..., None].astype(np.int32),
        tap_weights=fields.get("tap_weights"),
        image_mask=restrict_tags(image_mask, image_tags),
        images=images if cfg.fusion.has_images else None,
        source_ids=fields.get("source_ids"),
        rope_positions=fields.get("rope_positions"),
        **(packed if cfg.fusion.has_images else {}),
        layout=row_layout(cfg.data),
    )
    if not cfg.vision.keeps_aspect_in_tiles:
        return batch
    pixels = _read_normalized(cfg, fields["images"], filled, read)
    return stack_tiles(cfg, batch, pixels, filled.shape, is_own)


def _rows(images: Mapping[tuple[int, int], np.ndarray], count: int) -> list[list[np.ndarray]]:
    """Returns the images of each of `count` rows, given (row, slot) -> image in order."""
    rows = [[] for _ in range(count)]
    for (row, _), image in images.items():
        rows[row].append(image)
    return rows


def _first_tokens(
    cfg: Experiment, rows: Sequence[Sequence[np.ndarray]], shape: tuple[int, int]
) -> np.ndarray:
    """Returns the first token of each of (B, i) slots at native resolution, int32."""
    counts = np.zeros(shape, np.int32)
    for row, images in enumerate(rows):
        for slot, image in enumerate(images):
            counts[row, slot] = count_native_tokens(cfg, image.shape[:2])
    return np.cumsum(counts, axis=1, dtype=np.int32) - counts


def _slots(filled: np.ndarray) -> list[tuple[int, int]]:
    """Returns (row, slot) of the image slots that are filled, (B, i) bool."""
    return list(zip(*np.nonzero(filled), strict=True))


def _read_normalized(
    cfg: Experiment, indices: np.ndarray, filled: np.ndarray, read: Reader
) -> dict[tuple[int, int], np.ndarray]:
    """Reads the images of (B, i) slots: (row, slot) -> (H, W, 3) float32."""
    pixels = {}
    for slot, image in zip(_slots(filled), read(indices[filled].tolist()), strict=True):
        pixels[slot] = image_files.normalize(image, cfg.vision)
    return pixels


def _stack_images(
    cfg: Experiment, indices: np.ndarray, filled: np.ndarray, read: Reader
) -> tuple[np.ndarray, np.ndarray, MapMemory | None]:
    """Reads and normalizes the images of (B, i) slots.

    Returns:
      All views, (B, I, H, W, 3) float32; (B, I) bool, False for a missing view; and `map_memory`.
    """
    vision, side = cfg.vision, cfg.vision.image_size_px
    images = np.zeros((*indices.shape, vision.views, side, side, 3), np.float32)
    is_view = np.zeros((*indices.shape, vision.views), bool)
    tiles = {}
    for slot, pixels in zip(_slots(filled), read(indices[filled].tolist()), strict=True):
        images[slot] = tiling.stack_views([image_files.normalize(pixels, vision)], vision)
        tiles[slot] = tiling.describe_tiles(pixels, vision)
        is_view[slot] = tiling.view_mask([tiles[slot]], vision)
    rows = len(indices)
    memory = map_memory(cfg, tiles, indices.shape)
    return images.reshape(rows, -1, *images.shape[3:]), is_view.reshape(rows, -1), memory


def map_memory(
    cfg: Experiment, tiles: Mapping[tuple[int, int], tiling.Tiles], shape: tuple[int, int]
) -> MapMemory | None:
    """Returns the keys of cross-attention if they are maps of tiles, else None.

    Every image slot has room for the longest map, so that the slots before do not move a key.

    Args:
      tiles: (row, slot) -> the tiles of an image.
      shape: rows of images, and image slots of a row.
    """
    vision = cfg.vision
    if not has_maps_in_memory(vision, cfg.fusion):
        return None
    has_thumbnail = has_thumbnail_in_memory(vision, cfg.fusion)
    length = map_memory_length(vision, cfg.projector, cfg.fusion)  # of a slot
    shape = shape[0], shape[1] * length
    memory = MapMemory(np.full(shape, NO_IMAGE, np.int32), np.full(shape, PADDING, np.int32))
    if vision.max_map_tiles is not None:
        taps = np.zeros((*shape, TAPS), np.int32)
        memory = memory.replace(taps=taps, weights=taps.astype(np.float32))
    for (row, slot), tiles_of_image in tiles.items():
        first = slot * vision.views
        thumbnail = first + vision.cut_tiles if has_thumbnail else None
        size = tiling.shape_of_tiles(tiles_of_image, vision)
        fields = map_tokens(vision, cfg.projector, size, first, thumbnail)
        index = fields["image_token_index"]
        keys = row, slice(slot * length, slot * length + len(index))
        memory.index[keys] = index
        # The vector that ends a row belongs to the view before it.
        last_token = np.maximum.accumulate(np.where(index >= 0, np.arange(len(index)), 0))
        view = index[last_token] // cfg.image_tokens - first
        memory.views[keys] = slot * (vision.cut_tiles + has_thumbnail) + view + 1
        if memory.taps is not None:
            memory.taps[keys] = fields["image_taps"]
            memory.weights[keys] = fields["tap_weights"]
    return memory


def stack_tiles(
    cfg: Experiment,
    batch: Batch,
    images: Mapping[tuple[int, int], np.ndarray],
    shape: tuple[int, int],
    is_own: np.ndarray,
) -> Batch:
    """Adds images on the tiles of `vision.tile_layouts`, as Llama 3.2 Vision's encoder reads them.

    Args:
      cfg: the experiment.
      batch: its `image_mask` is (B, S, I), the images that each token reads.
      images: (row, slot) -> (rows * side, columns * side, 3) float32, normalized, of
        `tiling.fit_on_canvas`.
      shape: rows of images, and I, image slots of a row.
      is_own: (B, S, I) bool, the images of each token's own conversation.
    """
    vision, side = cfg.vision, cfg.vision.image_size_px
    pixels = np.zeros((*shape, vision.tiles, side, side, 3), np.float32)
    layouts = np.zeros(shape, np.int32)
    is_tile = np.zeros((*shape, vision.tiles), bool)  # (B, I, J)
    for slot, image in images.items():
        tiles = tiling.cut_tiles(image, vision)
        pixels[slot][: len(tiles)] = tiles
        is_tile[slot][: len(tiles)] = True
        layouts[slot] = vision.tile_layouts.index(tiling.grid_shape(image, vision)) + 1
    # Questions may share rows of images.
    of_tokens = of_token_rows(batch, is_tile)
    of_tokens = of_tokens.reshape(len(of_tokens), 1, -1)  # (B, 1, I * J)
    no_image_mask = None
    if cfg.fusion.tokens_without_image == "attend_all":
        no_image_mask = np.repeat(is_own, vision.tiles, axis=-1)
    return batch.replace(
        images=pixels,
        tile_layouts=layouts,
        # No token reads the first tile of a missing image. It keeps the encoder's softmax finite.
        tile_mask=is_tile | (np.arange(vision.tiles) == 0),
        image_mask=np.repeat(batch.image_mask, vision.tiles, axis=-1) & of_tokens,
        no_image_mask=no_image_mask,
    )


def as_tiled_batch(cfg: Experiment, batch: Batch) -> Batch:
    """Makes every image the first tile of an image with tiles, for an encoder that reads tiles.

    A batch of `stack_tiles` or without images is returned unchanged. The encoder emits M tokens for
    every tile, padding included, so image k begins at token k * vision.tiles * M.
    """
    vision = cfg.vision
    if not vision.tile_layouts or batch.images is None or batch.tile_layouts is not None:
        return batch
    images_before = batch.image_token_index // cfg.image_tokens
    added_tokens = images_before * (vision.tiles - 1) * cfg.image_tokens
    one_tile = vision.tile_layouts.index((1, 1)) + 1
    is_first = np.arange(batch.image_mask.shape[-1] * vision.tiles) % vision.tiles == 0
    rows, count = batch.images.shape[:2]
    padding = (0, vision.tiles - 1)
    tile_mask = np.zeros((rows, count, vision.tiles), bool)
    tile_mask[..., 0] = True
    return batch.replace(
        images=np.pad(batch.images[:, :, None], [(0, 0), (0, 0), padding, *[(0, 0)] * 3]),
        tile_layouts=np.full((rows, count), one_tile, np.int32),
        tile_mask=tile_mask,
        image_mask=np.repeat(batch.image_mask, vision.tiles, axis=-1) & is_first,
        image_token_index=offset_ids(batch.image_token_index, added_tokens),
    )
