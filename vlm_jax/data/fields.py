"""Fields of rows: the tokens of texts and images, with the attributes of each token."""

import functools
from collections.abc import Sequence

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data.tiling import view_mask
from vlm_jax.structs import NO_IMAGE, PADDING, TRUNK

Fields = dict[str, np.ndarray]  # of a row

# The type of each field, and its value in a slot without a token. `tokens` and `targets` are
# filled with the padding token.
FILL = {
    "image_tags": np.int32(NO_IMAGE),
    "positions": np.int32(0),
    "segment_ids": np.int32(PADDING),
    "branch_ids": np.int32(TRUNK),
    "block_ids": np.int32(0),
    "source_ids": np.int32(0),
    "image_token_index": np.int32(NO_IMAGE),
    "image_mask": np.bool_(False),
    "loss_weights": np.float32(0),
}


@functools.lru_cache
def image_fields(cfg: Experiment, tiles: int = 1, number: int = 0) -> Fields:
    """Tokens inserted for image `number` of a row, which has `tiles` tiles.

    Arrays of shape (N,), int32; cached, do not modify:

    - tokens: with `fusion.placeholder` first one <image>. Then, for each view, its tag and its
      grid of <image> tokens row by row; without the grid if the fusion style puts no image into the
      sequence. With `vision.newline_token` a <newline> ends every row of a grid.
    - image_token_index: index of the I * M image tokens that the slot holds, or NO_IMAGE.
    - image_tags: index of the I views that the token is a tag of, or NO_IMAGE.
    """
    rows, columns = cfg.projector.output_grid(cfg.vision)
    _, image, newline, _ = cfg.data.special_ids
    grid = np.full((rows, columns + cfg.vision.newline_token), image)
    grid[:, columns:] = newline
    grid_index = np.full_like(grid, NO_IMAGE)
    grid_index[:, :columns] = np.arange(rows * columns).reshape(rows, columns)

    views = np.flatnonzero(view_mask([tiles], cfg.vision)).tolist()
    count_in_sequence = min(cfg.views_in_sequence, len(views))
    # The thumbnail is the last view, so hybrid's one view in the sequence is the last.
    views_in_sequence = views[len(views) - count_in_sequence :]
    parts = [text_fields([image] if cfg.fusion.placeholder else [])]
    for view in views:
        index = number * cfg.vision.views + view  # among the I views of the row
        tag = text_fields(cfg.tile_tags[view] if cfg.tile_tags else [])
        parts.append(tag | {"image_tags": np.full_like(tag["tokens"], index)})
        if view in views_in_sequence:
            tokens = text_fields(grid.reshape(-1))
            image_token_index = offset_ids(grid_index.reshape(-1), index * cfg.image_tokens)
            parts.append(tokens | {"image_token_index": image_token_index})
    return concat_fields(parts)


def text_fields(ids: Sequence[int]) -> Fields:
    """Returns the fields of `image_fields` for tokens of text."""
    tokens = np.array(ids, np.int32)
    no_image = np.full_like(tokens, NO_IMAGE)
    return {"tokens": tokens, "image_token_index": no_image, "image_tags": no_image}


def concat_fields(parts: Sequence[Fields]) -> Fields:
    """Concatenates each field of parts that have the same fields."""
    joined = {}
    for name in parts[0]:
        joined[name] = np.concatenate([part[name] for part in parts])
    return joined


def offset_ids(ids: np.ndarray, offset: np.ndarray | int) -> np.ndarray:
    """Adds an offset to indices of image tokens or of views; NO_IMAGE stays."""
    return np.where(ids == NO_IMAGE, NO_IMAGE, ids + offset).astype(np.int32)


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
