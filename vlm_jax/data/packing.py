"""Conversations -> rows that hold several of them, each a segment with its own images, and batches of such rows.

    segment     1       1    1   1    1     | 2    2    2     | 3       3       3    3   3     | 0
    tokens   <image> <image> a   b  <eos>   | c    d  <eos>   | <image> <image> e    f  <eos>  | <pad>
    image       1       1    .   .    .     | .    .    .     | 2       2       .    .   .     | .

Rows fill first-fit from a window of rows that are open at a time (Grain's packer). What is packed is tokens and the
*numbers* of images: those are read when the row is done, so that every process packs the same rows and reads the images
of its own only. So batches are the same for any number of processes, and one place in the data is that of all.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data import images as image_files
from vlm_jax.data import templates, tiling
from vlm_jax.data.conversations import Conversation, Conversations
from vlm_jax.data.text import (
    FILL,
    Fields,
    offset_ids,
    restrict_tags,
)
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import NO_IMAGE, TRUNK, Batch

WINDOW_ROWS = 64  # open at a time, at the least: fewer waste more (measured: docs/conversations.md)
NO_CONVERSATION = 0  # owner of an image slot that is not filled


def check_image_counts(cfg: Experiment, source: Conversations) -> None:
    """Raises ConfigError where a conversation has more images than a row."""
    if cfg.fusion.has_images and source.most_images > cfg.data.images_per_row:
        raise ConfigError(
            f"data.images_per_row {cfg.data.images_per_row} is too small: a conversation of data.source "
            f"{cfg.data.source} has {source.most_images} images."
        )


def batches(
    cfg: Experiment, tokenizer: Tokenizer, source: Conversations, shard: slice
) -> grain.IterDataset:
    """Endless `Batch`es of the rows `shard` of each global batch of `train.batch_size` rows."""
    pool, read = ThreadPoolExecutor(max(cfg.data.threads, 1)), pixel_reader(cfg, source)

    def batch(rows: Sequence[Fields]) -> Batch:
        return as_tiled_batch(
            cfg, to_batch(cfg, rows[shard], lambda numbers: pool.map(read, numbers))
        )

    return _packed_dataset(cfg, tokenizer, source, batch)


def batch_ids(cfg: Experiment, tokenizer: Tokenizer, source: Conversations, state: dict) -> list:
    """Ids of the conversations in the batch, of all processes, that `batches` give after their state was `state`."""
    iterator = iter(
        _packed_dataset(
            cfg, tokenizer, source, lambda rows: [one for row in rows for one in row["id"]]
        )
    )
    iterator.set_state(state)
    return next(iterator)


def _packed_dataset(
    cfg: Experiment, tokenizer: Tokenizer, source: Conversations, batch: Callable
) -> grain.IterDataset:
    """What `batch` makes of the rows of each global batch; its place in the data is the same whatever it makes."""
    threads, rows = cfg.data.threads, cfg.train.batch_size
    stream = grain.MapDataset.source(source).seed(cfg.seed).shuffle()
    encoded = stream.map(
        functools.partial(encode_for_packing, cfg, tokenizer, tile_counter(cfg, source))
    ).repeat()
    lengths, padding = row_capacity(cfg)
    packed = grain.experimental.FirstFitPackIterDataset(
        encoded.to_iter_dataset(grain.ReadOptions(threads, max(threads, WINDOW_ROWS))),
        length_struct=lengths,
        padding_struct=padding,
        meta_features=["id", *(name for name in lengths if name not in ("tokens", "images"))],
        num_packing_bins=rows * -(-WINDOW_ROWS // rows),
        seed=cfg.seed,
    )
    made = packed.batch(rows, drop_remainder=True, batch_fn=batch)
    return grain.experimental.ThreadPrefetchIterDataset(
        made, prefetch_buffer_size=cfg.data.prefetch
    )


def encode_for_packing(
    cfg: Experiment,
    tokenizer: Tokenizer,
    tiles_of: Callable[[int], int],
    conversation: Conversation,
) -> Fields:
    """What the packer packs of a conversation: cut to the length of a row, with the images before the cut."""
    tile_counts = [tiles_of(number) for number in conversation.images]
    fields = templates.encode(cfg, tokenizer, conversation.turns, tile_counts)
    fields = templates.cut(cfg, fields, tile_counts, cfg.row_length)
    seen = fields["images_seen"].max(initial=0) if cfg.fusion.has_images else 0
    return fields | {
        "images": np.array(conversation.images[:seen], np.int32),
        "id": conversation.id,
    }


def row_capacity(cfg: Experiment) -> tuple[dict[str, int], dict[str, int]]:
    """How much of each field of an element a row holds, and what stands where there is nothing."""
    pad = cfg.data.special_ids[0]
    padding = {"tokens": pad, "targets": pad, "images_seen": 0, "images": NO_IMAGE}
    padding |= {name: FILL[name] for name in ("image_token_index", "image_tags", "loss_weights")}
    if cfg.fusion.placeholder:
        padding["images_from"] = 0
    if cfg.fusion.prefix == "bidirectional":
        padding["block_ids"] = FILL["block_ids"]
    return dict.fromkeys(padding, cfg.row_length) | {"images": cfg.data.images_per_row}, padding


def pixel_reader(
    cfg: Experiment, source: Conversations, is_exact: bool = False
) -> Callable[[int], np.ndarray]:
    """The number of an image -> (H, W, 3) uint8, laid out in tiles; those read last stay in memory.

    `is_exact` decodes all pixels of a large JPEG, as the processors of public checkpoints do.
    """
    vision, side = cfg.vision, cfg.vision.image_size_px
    keeps_size = is_exact or vision.cut_tiles > 1 or vision.keeps_aspect_in_tiles
    needed_px = 0 if keeps_size else side  # the layout is that of an image's own size

    def read(number: int) -> np.ndarray:
        name, encoded = source.image(number)
        return tiling.resize_to_grid(image_files.decode(encoded, name, needed_px), vision)

    return tiling.lru_cached(read, vision)


def tile_counter(cfg: Experiment, source: Conversations) -> Callable[[int], int]:
    """The number of an image -> how many tiles it has; where that may be several, its file is opened once to know."""
    if cfg.vision.cut_tiles == 1 or not cfg.fusion.has_images:
        return lambda number: 1

    @functools.cache
    def count(number: int) -> int:
        name, encoded = source.image(number)
        return tiling.tile_count(*image_files.upright_size(encoded, name), cfg.vision)

    return count


def to_batch(cfg: Experiment, rows: Sequence[Fields], read: Callable) -> Batch:
    """Rows as the packer makes them -> a batch with all views of data.images_per_row images.

    `read` takes the numbers of images and gives the pixels of each, (H, W, 3) uint8, laid out in tiles.
    """
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "id"}
    segment_ids, owners = fields["tokens_segment_ids"], fields["images_segment_ids"]
    own = (segment_ids[..., None] == owners[:, None]) & (owners != NO_CONVERSATION)[
        :, None
    ]  # (B, S, images)
    numbers = fields["images_positions"][:, None]
    is_read = own & (numbers < fields["images_seen"][..., None])
    if cfg.fusion.placeholder:
        is_read &= numbers >= fields["images_from"][..., None]
    views, first = cfg.vision.views, own.argmax(-1)
    filled = owners != NO_CONVERSATION
    if cfg.vision.keeps_aspect_in_tiles:
        places = zip(*np.nonzero(filled), strict=True)
        uint8 = zip(places, read(fields["images"][filled].tolist()), strict=True)
        pixels = {place: image_files.normalise(x, cfg.vision) for place, x in uint8}
        images, may_read = None, is_read
    else:
        images, there = _stack_images(cfg, fields["images"], filled, read)
        may_read = np.repeat(is_read, views, axis=-1) & there[:, None]
    batch = Batch(
        **{
            name: fields[name]
            for name in ("tokens", "targets", "loss_weights", "block_ids")
            if name in fields
        },
        positions=fields["tokens_positions"],
        segment_ids=segment_ids,
        branch_ids=np.full_like(segment_ids, TRUNK),
        image_token_index=offset_ids(fields["image_token_index"], first * views * cfg.image_tokens),
        image_mask=restrict_tags(may_read, offset_ids(fields["image_tags"], first * views)),
        images=images if cfg.fusion.has_images else None,
    )
    return (
        stack_tiles(cfg, batch, pixels, filled.shape, own)
        if cfg.vision.keeps_aspect_in_tiles
        else batch
    )


def _stack_images(
    cfg: Experiment, numbers: np.ndarray, filled: np.ndarray, read: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """(B, images) numbers -> (B, I, H, W, 3) float32, normalised, and (B, I) bool: which of all views are there."""
    vision, side, views = cfg.vision, cfg.vision.image_size_px, cfg.vision.views
    images = np.zeros((*numbers.shape, views, side, side, 3), np.float32)
    there = np.zeros((*numbers.shape, views), bool)
    places = zip(*np.nonzero(filled), strict=True)
    for place, pixels in zip(places, read(numbers[filled].tolist()), strict=True):
        images[place] = tiling.stack_views([image_files.normalise(pixels, vision)], vision)
        there[place] = tiling.view_mask([tiling.count_tiles(pixels, vision)], vision)
    rows = len(numbers)
    return images.reshape(rows, -1, *images.shape[3:]), there.reshape(rows, -1)


def stack_tiles(
    cfg: Experiment,
    batch: Batch,
    images: Mapping[tuple[int, int], np.ndarray],
    shape: tuple[int, int],
    own: np.ndarray,
) -> Batch:
    """The batch with images on the tiles of `vision.tile_layouts`, as the encoder of Llama 3.2 Vision reads them.

    Args:
      batch: its `image_mask` is (B, S, I), which images each token reads.
      images: (row, number) -> (rows * side, columns * side, 3) float32, normalised, of `tiles.on_canvas`.
      shape: rows of images, and I, images of a row.
      own: (B, S, I) bool, which images are of each token's own conversation.
    """
    vision, side = cfg.vision, cfg.vision.image_size_px
    pixels = np.zeros((*shape, vision.tiles, side, side, 3), np.float32)
    layouts, there = np.zeros(shape, np.int32), np.zeros((*shape, vision.tiles), bool)
    for place, image in images.items():
        parts = tiling.cut_tiles(image, vision)
        pixels[place][: len(parts)], there[place][: len(parts)] = parts, True
        layouts[place] = vision.tile_layouts.index(tiling.grid_shape(image, vision)) + 1
    shown = there if batch.image_rows is None else there[batch.image_rows]
    mask = np.repeat(batch.image_mask, vision.tiles, axis=-1) & shown.reshape(len(shown), 1, -1)
    blind = (
        np.repeat(own, vision.tiles, axis=-1)
        if cfg.fusion.tokens_without_image == "attend_all"
        else None
    )
    # The first tile of a missing image is read by no token, but keeps the encoder's softmax finite.
    tile_mask = there | (np.arange(vision.tiles) == 0)
    return batch.replace(
        images=pixels,
        tile_layouts=layouts,
        tile_mask=tile_mask,
        image_mask=mask,
        no_image_mask=blind,
    )


def as_tiled_batch(cfg: Experiment, batch: Batch) -> Batch:
    """The batch as an encoder with tiles reads it: every image is its own first tile, and the others are missing.

    A batch of `stack_tiles` stays as it is.

    The encoder emits M tokens for every tile, there or not, so those of image k begin at k * vision.tiles * M.
    """
    vision = cfg.vision
    if not vision.tile_layouts or batch.images is None or batch.tile_layouts is not None:
        return batch
    images_before = batch.image_token_index // cfg.image_tokens
    layout = vision.tile_layouts.index((1, 1)) + 1
    missing = [(0, vision.tiles - 1)]
    first_of_each = np.arange(batch.image_mask.shape[-1] * vision.tiles) % vision.tiles == 0
    return batch.replace(
        images=np.pad(batch.images[:, :, None], [(0, 0)] * 2 + missing + [(0, 0)] * 3),
        tile_layouts=np.full(batch.images.shape[:2], layout, np.int32),
        tile_mask=np.pad(np.ones((*batch.images.shape[:2], 1), bool), [(0, 0)] * 2 + missing),
        image_mask=np.repeat(batch.image_mask, vision.tiles, axis=-1) & first_of_each,
        image_token_index=offset_ids(
            batch.image_token_index, images_before * (vision.tiles - 1) * cfg.image_tokens
        ),
    )
