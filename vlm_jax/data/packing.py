"""Packs conversations into rows: each is a segment with its own images.

    segment     1       1    1  1    1   | 2  2    2   |    3       3    3  3    3   |   0
    tokens   <image> <image> a  b  <eos> | c  d  <eos> | <image> <image> e  f  <eos> | <pad>
    image       1       1    .  .    .   | .  .    .   |    2       2    .  .    .   |   .

Rows are filled first-fit, with a window of rows open at a time (Grain's packer). The packer gets
tokens and the *indices* of images; images are read when a row is complete. So every process packs
the same rows, but reads the images of its rows only: batches and the iterator's state do not
depend on the number of processes.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data import images as image_files
from vlm_jax.data import native, templates, tiling
from vlm_jax.data.batching import as_tiled_batch, to_batch
from vlm_jax.data.conversations import Conversation, Conversations
from vlm_jax.data.fields import FILL, TAP_FIELDS, Fields, without_scores
from vlm_jax.data.mixture import Part, mix
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import NO_IMAGE, Batch

# Rows open at a time, at least. Fewer waste more slots (measured: docs/conversations.md).
WINDOW_ROWS = 64


def check_image_counts(cfg: Experiment, source: Conversations) -> None:
    """Raises ConfigError if a conversation has more images than a row."""
    if cfg.fusion.has_images and source.most_images > cfg.data.images_per_row:
        raise ConfigError(
            f"data.images_per_row {cfg.data.images_per_row} is too small: a conversation of "
            f"data.source {cfg.data.source} has {source.most_images} images."
        )
    if cfg.fusion.has_images and cfg.vision.is_native:
        needed = source.most_images * cfg.vision.max_squares
        if needed > cfg.squares_per_row:
            raise ConfigError(
                f"data.patches_per_row {cfg.data.patches_per_row} is too small: a conversation of "
                f"data.source {cfg.data.source} has {source.most_images} images of up to "
                f"vision.max_patches {cfg.vision.max_patches} patches. Set at least "
                f"{needed * cfg.vision.patch_square**2}."
            )


def batches(
    cfg: Experiment, tokenizer: Tokenizer, parts: Sequence[Part], own: slice
) -> grain.IterDataset:
    """Endless `Batch`es of the rows `own` of each global batch of `train.batch_size` rows."""
    return _packed_dataset(cfg, tokenizer, parts, _batch_maker(cfg, parts, own))


def validation_batches(
    cfg: Experiment, tokenizer: Tokenizer, parts: Sequence[Part], own: slice
) -> grain.IterDataset:
    """The `Batch`es of `batches` of every conversation once, in the order of the sources.

    The last batch is filled up with rows without a scored token.
    """
    make_batch = _batch_maker(cfg, parts, own)

    def make_full_batch(rows: Sequence[Fields]):
        missing = cfg.train.batch_size - len(rows)
        return make_batch([*rows, *[without_scores(rows[-1])] * missing])

    return _packed_dataset(cfg, tokenizer, parts, make_full_batch, is_training=False)


def _batch_maker(
    cfg: Experiment, parts: Sequence[Part], own: slice
) -> Callable[[Sequence[Fields]], Batch]:
    pool = ThreadPoolExecutor(max(cfg.data.threads, 1))
    reader = pixel_reader(cfg, MixedImages([part.examples for part in parts]))

    def read(indices: Sequence[int]):
        return pool.map(reader, indices)

    def make_batch(rows: Sequence[Fields]):
        return as_tiled_batch(cfg, to_batch(cfg, rows[own], read))

    return make_batch


def row_ids(
    cfg: Experiment, tokenizer: Tokenizer, parts: Sequence[Part], state: dict
) -> list[list[str]]:
    """Returns the conversation ids of each row of the global batch after iterator state `state`."""

    def read_ids(rows: Sequence[Fields]) -> list[list[str]]:
        return [list(row["id"]) for row in rows]

    iterator = iter(_packed_dataset(cfg, tokenizer, parts, read_ids))
    iterator.set_state(state)
    return next(iterator)


def _packed_dataset(
    cfg: Experiment,
    tokenizer: Tokenizer,
    parts: Sequence[Part],
    make_batch: Callable[[Sequence[Fields]], Any],
    is_training: bool = True,
) -> grain.IterDataset:
    """Yields `make_batch` of the rows of each global batch; the state is independent of it.

    In training the conversations are shuffled, repeated and mixed, and all batches are full.
    """
    threads, batch_size = cfg.data.threads, cfg.train.batch_size
    epochs = []
    for part in parts:
        conversations = part.shuffled() if is_training else grain.MapDataset.source(part.examples)
        epochs.append(conversations.map(_part_encoder(tokenizer, part, len(parts))))
    encoded = mix(cfg, epochs) if is_training else grain.MapDataset.concatenate(epochs)
    lengths, padding = row_capacity(cfg)
    # The packer adds segment ids and positions to each field; only tokens and images need them.
    unsegmented = [name for name in lengths if name not in ("tokens", "images")]
    packed = grain.experimental.FirstFitPackIterDataset(
        encoded.to_iter_dataset(grain.ReadOptions(threads, max(threads, WINDOW_ROWS))),
        length_struct=lengths,
        padding_struct=padding,
        meta_features=["id", *unsegmented],
        # A multiple of the batch size that is at least the window.
        num_packing_bins=batch_size * -(-WINDOW_ROWS // batch_size),
        seed=cfg.seed,
    )
    return grain.experimental.ThreadPrefetchIterDataset(
        packed.batch(batch_size, drop_remainder=is_training, batch_fn=make_batch),
        prefetch_buffer_size=cfg.data.prefetch,
    )


def _part_encoder(tokenizer: Tokenizer, part: Part, count: int) -> Callable[[Conversation], Fields]:
    """Returns a function: conversation of a source -> its fields, with indices of `MixedImages`."""
    encode = functools.partial(
        encode_for_packing, part.cfg, tokenizer, tile_counter(part.cfg, part.examples)
    )

    def encode_part(conversation: Conversation) -> Fields:
        fields = part.tagged(encode(conversation))
        images = fields["images"] * count + part.number
        return fields | {"images": images, "id": part.label(conversation.id)}

    return encode_part


class MixedImages:
    """The images of several sources: image i of source n of N has the index i * N + n."""

    def __init__(self, sources: Sequence[Conversations]):
        self._sources = sources

    def image(self, index: int) -> tuple[str, bytes]:
        """Returns the name of an image for error messages, and the content of its file."""
        index, number = divmod(index, len(self._sources))
        return self._sources[number].image(index)


def encode_for_packing(
    cfg: Experiment,
    tokenizer: Tokenizer,
    predict_tiles: Callable[[int], tiling.Tiles],
    conversation: Conversation,
) -> Fields:
    """Returns the fields of a conversation and its images, cut to the length of a row."""
    tiles = [predict_tiles(index) for index in conversation.images]
    fields = templates.encode(cfg, tokenizer, conversation.turns, tiles, conversation.system)
    fields = templates.cut(cfg, fields, tiles, cfg.row_length)
    seen = fields["images_seen"].max(initial=0) if cfg.fusion.has_images else 0
    fields |= {"images": np.array(conversation.images[:seen], np.int32), "id": conversation.id}
    if cfg.fusion.has_images and cfg.vision.is_native:
        counts = [native.count_squares(image, cfg.vision) for image in tiles[:seen]]
        # The packer adds up their number.
        fields["image_squares"] = np.zeros(sum(counts), np.int8)
    return fields


def row_capacity(cfg: Experiment) -> tuple[dict[str, int], dict[str, int]]:
    """Returns each packed field's length in a row, and the value of its empty slots."""
    pad = cfg.data.special_ids[0]
    padding = {"tokens": pad, "targets": pad, "images_seen": 0, "images": NO_IMAGE}
    padding |= {name: FILL[name] for name in ("image_token_index", "image_tags", "loss_weights")}
    if cfg.fusion.placeholder:
        padding["images_from"] = 0
    if cfg.fusion.has_blocks:
        padding["block_ids"] = FILL["block_ids"]
    if cfg.decoder.rope.sections and cfg.fusion.image_in_sequence:
        padding["rope_positions"] = FILL["rope_positions"]
    if cfg.vision.max_map_tiles is not None and cfg.has_maps_in_sequence:
        padding |= {name: FILL[name] for name in TAP_FIELDS}
    if cfg.data.mixture:
        padding["source_ids"] = FILL["source_ids"]
    lengths = dict.fromkeys(padding, cfg.row_length) | {"images": cfg.data.images_per_row}
    if cfg.fusion.has_images and cfg.vision.is_native:
        lengths["image_squares"], padding["image_squares"] = cfg.squares_per_row, 0
    return lengths, padding


def pixel_reader(
    cfg: Experiment, source: Conversations | MixedImages, is_exact: bool = False
) -> Callable[[int], np.ndarray]:
    """Returns a cached function: image index -> (H, W, 3) uint8, resized to its grid of tiles.

    `is_exact` decodes all pixels of a large JPEG, as the processors of public checkpoints do.
    """
    vision = cfg.vision
    # The grid of tiles depends on the image's own size, so a reduced JPEG could change it.
    has_grid = vision.cut_tiles > 1 or vision.keeps_aspect_in_tiles or bool(vision.tile_grids)
    keeps_size = is_exact or has_grid or vision.is_native
    needed_px = 0 if keeps_size else vision.image_size_px

    def read(index: int) -> np.ndarray:
        name, encoded = source.image(index)
        image = image_files.decode(encoded, name, needed_px, vision.rgb_conversion)
        return tiling.resize_to_grid(image, vision)

    return tiling.lru_cached(read, vision)


def tile_counter(cfg: Experiment, source: Conversations) -> Callable[[int], tiling.Tiles]:
    """Returns a function: image index -> its tiles; it reads the header of an image once."""
    has_grid = cfg.vision.cut_tiles > 1 or cfg.vision.tile_grids or cfg.vision.is_native
    if not has_grid or not cfg.fusion.has_images:
        return lambda index: 1

    @functools.cache
    def count(index: int) -> tiling.Tiles:
        name, encoded = source.image(index)
        return tiling.predict_tiles(*image_files.upright_size(encoded, name), cfg.vision)

    return count
