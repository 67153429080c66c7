"""Fields of rows: the tokens of texts and images, with the attributes of each token."""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from vlm_jax.config import ConfigError, Experiment, Projector, Vision
from vlm_jax.config.tile_maps import TAPS, Shape, TileMap, make_tile_map
from vlm_jax.data import native
from vlm_jax.data.tiling import Tiles, shape_of_tiles, view_mask
from vlm_jax.structs import NEWLINE, NO_IMAGE, PADDING, TRUNK

Fields = dict[str, np.ndarray]  # of a row

# The type of each field, and its value in a slot without a token. `tokens` and `targets` are
# filled with the padding token.
FILL = {
    "image_tags": np.int32(NO_IMAGE),
    "positions": np.int32(0),
    "rope_positions": np.int32(0),
    "segment_ids": np.int32(PADDING),
    "branch_ids": np.int32(TRUNK),
    "block_ids": np.int32(0),
    "source_ids": np.int32(0),
    "image_token_index": np.int32(NO_IMAGE),
    "image_taps": np.int32(0),
    "tap_weights": np.float32(0),
    "image_mask": np.bool_(False),
    "loss_weights": np.float32(0),
}
TAP_FIELDS = ("image_taps", "tap_weights")


def fields_of_images(cfg: Experiment, tiles: Sequence[Tiles]) -> Iterator[Fields]:
    """Yields `image_fields` of the images of a row, in order."""
    if not cfg.vision.is_native:
        for number, image in enumerate(tiles):
            yield image_fields(cfg, image, number)
        return
    first_token = 0
    for image in tiles:
        fields = image_fields(cfg, image)
        index = offset_ids(fields["image_token_index"], first_token)
        yield fields | {"image_token_index": index}
        first_token += count_native_tokens(cfg, image)


@functools.lru_cache
def image_fields(cfg: Experiment, tiles: Tiles = 1, number: int = 0) -> Fields:
    """Tokens inserted for image `number` of a row, which has these tiles.

    At native resolution the tokens are counted as if it was the first image.

    Arrays of shape (N,), int32; cached, do not modify:

    - tokens: with `fusion.placeholder` first one <image>. Then, for each view, its tag and its
      grid of <image> tokens row by row; without the grid if the fusion style puts no image into the
      sequence. With `vision.newline_token` a <newline> ends every row of a grid, at native
      resolution every row but the last. With a map in the sequence (`vision.tile_grids`) there is
      one <image> for each token of thumbnail and map.
    - image_token_index: index of the I * M image tokens that the slot holds, or NO_IMAGE.
    - image_tags: index of the I views that the token is a tag of, or NO_IMAGE.
    """
    if cfg.has_maps_in_sequence:
        return _map_fields(cfg, tiles, number)
    if cfg.vision.is_native:
        return _native_fields(cfg, tiles)
    tokens, token_index = _grid_with_newlines(cfg, cfg.projector.output_grid(cfg.vision))
    views = np.flatnonzero(view_mask([tiles], cfg.vision)).tolist()
    count_in_sequence = min(cfg.views_in_sequence, len(views))
    # The thumbnail is the last view, so hybrid's one view in the sequence is the last.
    views_in_sequence = views[len(views) - count_in_sequence :]
    parts = [text_fields([cfg.data.special_ids[1]] if cfg.fusion.placeholder else [])]
    for view in views:
        index = number * cfg.vision.views + view  # among the I views of the row
        tag = text_fields(cfg.tile_tags[view] if cfg.tile_tags else [])
        parts.append(tag | {"image_tags": np.full_like(tag["tokens"], index)})
        if view in views_in_sequence:
            image_token_index = offset_ids(token_index, index * cfg.image_tokens)
            parts.append(text_fields(tokens) | {"image_token_index": image_token_index})
    return concat_fields(parts)


def _native_fields(cfg: Experiment, tiles: Tiles) -> Fields:
    """`image_fields` of an image at native resolution."""
    image = cfg.data.special_ids[1]
    placeholder = text_fields([image] if cfg.fusion.placeholder else [])
    if not cfg.fusion.image_in_sequence:
        return placeholder
    tokens, index = _grid_with_newlines(cfg, _native_grid(cfg, tiles))
    # The last row has no newline.
    end = len(tokens) - cfg.vision.newline_token
    grid = text_fields(tokens[:end]) | {"image_token_index": index[:end]}
    return concat_fields([placeholder, grid])


def _grid_with_newlines(cfg: Experiment, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a grid row by row, and the index of each, (N,) int32.

    With `vision.newline_token` a <newline> ends every row; its index is NO_IMAGE.
    """
    rows, columns = shape
    _, image, newline, _ = cfg.data.special_ids
    tokens = np.full((rows, columns + cfg.vision.newline_token), image, np.int32)
    tokens[:, columns:] = newline
    index = np.full_like(tokens, NO_IMAGE)
    index[:, :columns] = np.arange(rows * columns).reshape(rows, columns)
    return tokens.reshape(-1), index.reshape(-1)


def count_native_tokens(cfg: Experiment, tiles: Tiles) -> int:
    """Returns the number of tokens of an image at native resolution."""
    return math.prod(_native_grid(cfg, tiles))


def _native_grid(cfg: Experiment, tiles: Tiles) -> Shape:
    """Returns the rows and columns of the tokens of an image at native resolution."""
    if not cfg.model.has_tokens_by_size:
        return cfg.projector.output_grid(cfg.vision)
    return native.token_grid(shape_of_tiles(tiles, cfg.vision), cfg.vision)


def rope_fields(cfg: Experiment, image_token_index: np.ndarray, tiles: Sequence[Tiles]) -> Fields:
    """Returns `rope_positions` (N, 3) of a text about images, if `rope.sections` need them."""
    if not (cfg.decoder.rope.sections and cfg.fusion.image_in_sequence):
        return {}
    if cfg.vision.is_native:
        grids = [_native_grid(cfg, image) for image in tiles]
    else:
        grids = [cfg.projector.output_grid(cfg.vision)] * (len(tiles) * cfg.vision.views)
    counts = np.array([math.prod(grid) for grid in grids], np.int32)
    # The image or view of each token, from 1; a token of text has the index -1, so 0.
    owners = np.searchsorted(np.cumsum(counts) - counts, image_token_index, side="right")
    return {"rope_positions": native.rope_positions(owners, grids)}


def _map_fields(cfg: Experiment, tiles: Tiles, number: int) -> Fields:
    """`image_fields` of an image whose tiles are put back together."""
    vision = cfg.vision
    first_view = number * vision.views
    tokens = map_tokens(
        vision,
        cfg.projector,
        shape_of_tiles(tiles, vision),
        first_view,
        first_view + vision.cut_tiles if vision.thumbnail else None,
    )
    ids = [cfg.data.special_ids[1]] * len(tokens["image_token_index"])
    return text_fields(ids) | tokens


def map_tokens(
    vision: Vision,
    projector: Projector,
    image: Shape | None,
    first_view: int = 0,
    thumbnail_view: int | None = None,
) -> Fields:
    """Returns the N tokens of an image: its thumbnail, then the map of its tiles, row by row.

    `config/tile_maps.py` draws the map.

    Args:
      image: (height, width) in px; None: the image is its thumbnail alone, which one vector ends.
      first_view: the view that is its first tile.
      thumbnail_view: the view that is its thumbnail; None: it has none.

    Returns:
      image_token_index (N,) and, with `vision.max_map_tiles`, image_taps and tap_weights (N, 4).
    """
    size = projector.num_tokens(vision)
    parts = []
    if thumbnail_view is not None:
        parts.append(_uninterpolated(np.arange(size) + thumbnail_view * size))
    if image is None:
        parts.append(_uninterpolated(np.array([NEWLINE])))
    else:
        tile_map = make_tile_map(vision, projector, image)
        parts.append(_grid_tokens(tile_map, projector.output_grid(vision), first_view))
    names = ("image_token_index",)
    if vision.max_map_tiles is not None:
        names += TAP_FIELDS
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _grid_tokens(tile_map: TileMap, view: Shape, first_view: int) -> Fields:
    """Tokens of a map, each row with its last vector; `view` is the (rows, columns) of a tile."""
    rows, columns = tile_map.resized
    size = view[0] * view[1]
    row_taps, row_weights = _interpolate(tile_map.rows, rows)  # (2, rows)
    column_taps, column_weights = _interpolate(tile_map.columns, columns)  # (2, columns)
    tile_row, row = np.divmod(row_taps + tile_map.top, view[0])
    tile_column, column = np.divmod(column_taps + tile_map.left, view[1])
    # The index of a token is a number of its row plus a number of its column.
    of_row = (tile_row * tile_map.grid[1] + first_view) * size + row * view[1]
    of_column = tile_column * size + column
    taps = of_row[:, None, :, None] + of_column[None, :, None, :]  # (2, 2, rows, columns)
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    taps = taps.reshape(TAPS, rows, columns)
    weights = weights.reshape(TAPS, rows, columns)
    nearest = np.take_along_axis(taps, weights.argmax(0)[None], axis=0)[0]  # (rows, columns)

    tokens = {
        "image_token_index": nearest,
        "image_taps": np.moveaxis(taps, 0, -1),
        "tap_weights": np.moveaxis(weights, 0, -1),
    }
    newlines = _uninterpolated(np.full(rows, NEWLINE))
    fields = {}
    for name, values in tokens.items():
        row = np.concatenate([values, newlines[name][:, None]], axis=1)
        fields[name] = row.reshape(-1, *row.shape[2:]).astype(newlines[name].dtype)
    return fields


def _interpolate(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the two taps of each position of a resized axis, and their weights, (2, new_size).

    The centers of pixels are aligned and nothing is averaged, as in torch's `interpolate`.
    """
    scale = np.float32(size / max(new_size, 1))
    position = (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    position = np.maximum(position, 0)
    low = np.floor(position).astype(np.int32)
    high = np.minimum(low + 1, size - 1)
    fraction = position - low
    return np.stack([low, high]), np.stack([1 - fraction, fraction])


def _uninterpolated(index: np.ndarray) -> Fields:
    taps = np.repeat(np.maximum(index, 0)[:, None], TAPS, axis=1)
    weights = np.zeros(taps.shape, np.float32)
    weights[:, 0] = 1
    return {
        "image_token_index": index.astype(np.int32),
        "image_taps": taps.astype(np.int32),
        "tap_weights": weights,
    }


def text_fields(ids: Sequence[int]) -> Fields:
    """Returns the fields of `image_fields` for tokens of text."""
    tokens = np.array(ids, np.int32)
    no_image = np.full_like(tokens, NO_IMAGE)
    return {"tokens": tokens, "image_token_index": no_image, "image_tags": no_image}


def concat_fields(parts: Sequence[Fields]) -> Fields:
    """Concatenates each field of parts; only images have the fields of `tap_fields`."""
    joined = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        arrays = [part[name] if name in part else _no_taps(part, name) for part in parts]
        joined[name] = np.concatenate(arrays)
    return joined


def tap_fields(cfg: Experiment, fields: Fields) -> Fields:
    """Returns the fields of resized maps (`vision.max_map_tiles`), also of a text without images.

    Args:
      fields: of `concat_fields`.
    """
    if cfg.vision.max_map_tiles is None or not cfg.has_maps_in_sequence:
        return {}
    return {name: fields.get(name, _no_taps(fields, name)) for name in TAP_FIELDS}


def _no_taps(fields: Fields, name: str) -> np.ndarray:
    return np.full((len(fields["tokens"]), TAPS), FILL[name])


def offset_ids(ids: np.ndarray, offset: np.ndarray | int) -> np.ndarray:
    """Adds an offset to indices of image tokens or of views; NO_IMAGE and NEWLINE stay."""
    return np.where(ids < 0, ids, ids + offset).astype(np.int32)


def image_blocks(cfg: Experiment, image_token_index: np.ndarray) -> np.ndarray:
    """Returns `Batch.block_ids` in which the tokens of each view of an image are a block."""
    return (image_token_index // cfg.image_tokens + 1).astype(np.int32)


def restrict_tags(image_mask: np.ndarray, image_tags: np.ndarray) -> np.ndarray:
    """Restricts a tag to the view that it names.

    Args:
      image_mask: (..., S, I) bool, the views that a token may read.
      image_tags: (..., S), the view that a token is a tag of, or NO_IMAGE.
    """
    tags = image_tags[..., None]  # (..., S, 1)
    is_own_view = tags == np.arange(image_mask.shape[-1])  # (..., S, I)
    return image_mask & ((tags == NO_IMAGE) | is_own_view)


def pad_left(cfg: Experiment, row: Fields, length: int | None) -> Fields:
    """Pads the row of a prompt on the left to `length`; None: no padding.

    Raises:
      ConfigError: the row is longer.
    """
    size = len(row["tokens"])
    length = size if length is None else length
    if size > length:
        raise ConfigError(
            f"a prompt has {size} tokens with its images, more than the {length} of its batch."
        )
    return pad_row(cfg, row, length - size, length)


def pad_row(cfg: Experiment, row: Fields, before: int, length: int) -> Fields:
    """Pads the fields of a row to `length`, with `before` empty slots in front."""
    pad = np.int32(cfg.data.special_ids[0])
    padded = {}
    for name, values in row.items():
        fill = pad if name in ("tokens", "targets") else FILL[name]
        padded[name] = np.full((length, *values.shape[1:]), fill)
        padded[name][before : before + len(values)] = values
    return padded


def without_scores(row: Fields) -> Fields:
    """Returns a row to fill up a batch: the same without a scored token."""
    return row | {"loss_weights": np.zeros_like(row["loss_weights"])}
