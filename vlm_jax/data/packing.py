"""Conversations -> rows that hold several of them, each a segment with its own images, and batches of such rows.

    segment     1       1    1   1    1     | 2    2    2     | 3       3       3    3   3     | 0
    tokens   <image> <image> a   b  <eos>   | c    d  <eos>   | <image> <image> e    f  <eos>  | <pad>
    image       1       1    .   .    .     | .    .    .     | 2       2       .    .   .     | .

Rows fill first-fit from a window of rows that are open at a time (Grain's packer). What is packed is tokens and the
*numbers* of images: those are read when the row is done, so that every process packs the same rows and reads the images
of its own only. So batches are the same for any number of processes, and one place in the data is that of all.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

from vlm_jax.config import ConfigError, Experiment, Vision
from vlm_jax.data import images as image_files
from vlm_jax.data import templates
from vlm_jax.data.conversations import Conversation, Conversations
from vlm_jax.data.text import FILL, Fields, Tokenizer
from vlm_jax.structs import NO_IMAGE, TRUNK, Batch

WINDOW_ROWS = 64  # open at a time, at the least: fewer waste more (measured: docs/conversations.md)
NO_CONVERSATION = 0  # owner of an image slot that is not filled


def check(cfg: Experiment, source: Conversations) -> None:
    """Raises ConfigError where a conversation has more images than a row."""
    if cfg.fusion.has_images and source.most_images > cfg.data.images_per_row:
        raise ConfigError(
            f"data.images_per_row {cfg.data.images_per_row} is too small: a conversation of data.source "
            f"{cfg.data.source} has {source.most_images} images."
        )


def batches(cfg: Experiment, tokenizer: Tokenizer, source: Conversations, shard: slice) -> grain.IterDataset:
    """Endless `Batch`es of the rows `shard` of each global batch of `train.batch_size` rows."""
    check(cfg, source)
    threads, rows = cfg.data.threads, cfg.train.batch_size
    stream = grain.MapDataset.source(source).seed(cfg.seed).shuffle()
    encoded = stream.map(functools.partial(element, cfg, tokenizer)).repeat()
    lengths, padding = capacity(cfg)
    packed = grain.experimental.FirstFitPackIterDataset(
        encoded.to_iter_dataset(grain.ReadOptions(threads, max(threads, WINDOW_ROWS))),
        length_struct=lengths,
        padding_struct=padding,
        meta_features=[name for name in lengths if name not in ("tokens", "images")],
        num_packing_bins=rows * -(-WINDOW_ROWS // rows),
        seed=cfg.seed,
    )
    pool, read = ThreadPoolExecutor(max(threads, 1)), pixel_reader(cfg, source)

    def batch(rows: Sequence[Fields]) -> Batch:
        return tiled(cfg.vision, to_batch(cfg, rows[shard], lambda numbers: pool.map(read, numbers)))

    made = packed.batch(rows, drop_remainder=True, batch_fn=batch)
    return grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=cfg.data.prefetch)


def element(cfg: Experiment, tokenizer: Tokenizer, conversation: Conversation) -> Fields:
    """What the packer packs of a conversation, cut to the length of a row."""
    fields = templates.encode(cfg, tokenizer, conversation.turns)
    numbers = conversation.images if cfg.fusion.has_images else ()
    cut = {name: values[: cfg.row_length] for name, values in fields.items()}
    return cut | {"images": np.array(numbers, np.int32)}


def capacity(cfg: Experiment) -> tuple[dict[str, int], dict[str, int]]:
    """How much of each field of an element a row holds, and what stands where there is nothing."""
    pad = cfg.data.special_ids[0]
    padding = {"tokens": pad, "targets": pad, "images_seen": 0, "images": NO_IMAGE}
    padding |= {name: FILL[name] for name in ("image_slots", "loss_weights")}
    if cfg.fusion.prefix == "bidirectional":
        padding["block_ids"] = FILL["block_ids"]
    return dict.fromkeys(padding, cfg.row_length) | {"images": cfg.data.images_per_row}, padding


def pixel_reader(cfg: Experiment, source: Conversations) -> Callable[[int], np.ndarray]:
    """The number of an image -> (H, W, 3) uint8; those read last stay in memory."""
    side = cfg.vision.image_size_px

    @functools.lru_cache(image_files.CACHE_BYTES // (3 * side**2))
    def read(number: int) -> np.ndarray:
        name, encoded = source.image(number)
        return image_files.fit(image_files.decode(encoded, f"image {name}", side), side)

    return read


def to_batch(cfg: Experiment, rows: Sequence[Fields], read: Callable) -> Batch:
    """Rows as the packer makes them -> a batch with I = data.images_per_row, its images not yet cut into tiles.

    `read` takes the numbers of images and gives the pixels of each, (H, W, 3) uint8.
    """
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    segment_ids, owners = fields["tokens_segment_ids"], fields["images_segment_ids"]
    own = (segment_ids[..., None] == owners[:, None]) & (owners != NO_CONVERSATION)[:, None]  # (B, S, I)
    is_before = fields["images_positions"][:, None] < fields["images_seen"][..., None]
    slots, first = fields["image_slots"], own.argmax(-1)
    return Batch(
        **{name: fields[name] for name in ("tokens", "targets", "loss_weights", "block_ids") if name in fields},
        positions=fields["tokens_positions"],
        segment_ids=segment_ids,
        branch_ids=np.full_like(segment_ids, TRUNK),
        image_slots=np.where(slots == NO_IMAGE, NO_IMAGE, slots + first * cfg.image_tokens).astype(np.int32),
        image_mask=own & is_before,
        images=_images(cfg, fields["images"], owners != NO_CONVERSATION, read) if cfg.fusion.has_images else None,
    )


def _images(cfg: Experiment, numbers: np.ndarray, filled: np.ndarray, read: Callable) -> np.ndarray:
    """(B, I) numbers -> (B, I, H, W, 3) float32, normalised; zeros where a slot is not filled."""
    side = cfg.vision.image_size_px
    images = np.zeros((*numbers.shape, side, side, 3), np.float32)
    places = zip(*np.nonzero(filled), strict=True)
    for place, pixels in zip(places, read(numbers[filled].tolist()), strict=True):
        images[place] = image_files.normalise(pixels, cfg.vision)
    return images


def tiled(vision: Vision, batch: Batch) -> Batch:
    """The batch as an encoder with tiles reads it: every image is its own first tile, and the others are not there."""
    if not vision.tile_layouts or batch.images is None:
        return batch
    layout = vision.tile_layouts.index((1, 1)) + 1
    missing = [(0, vision.tiles - 1)]
    first_of_each = np.arange(batch.image_mask.shape[-1] * vision.tiles) % vision.tiles == 0
    return batch.replace(
        images=np.pad(batch.images[:, :, None], [(0, 0)] * 2 + missing + [(0, 0)] * 3),
        tile_layouts=np.full(batch.images.shape[:2], layout, np.int32),
        tile_mask=np.pad(np.ones((*batch.images.shape[:2], 1), bool), [(0, 0)] * 2 + missing),
        image_mask=np.repeat(batch.image_mask, vision.tiles, axis=-1) & first_of_each,
    )
