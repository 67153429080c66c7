"""Model inputs as transformers names them -> a `Batch`.

`input_ids`, `attention_mask`, `position_ids`, `token_type_ids`, `pixel_values` (or `image_patches`),
`aspect_ratio_ids`, `aspect_ratio_mask`, `cross_attention_mask`, `decoder_input_ids`, `decoder_attention_mask`,
`decoder_position_ids`. Images are (..., channels, height, width) there, but for Fuyu's, which are patches flattened in
the order (row, column, channel).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from vlm_jax.config import (
    CHANNELS,
    ConfigError,
    Decoder,
    Experiment,
    Fusion,
)
from vlm_jax.structs import NO_IMAGE, TRUNK, Batch

Arrays = Mapping[str, np.ndarray]
TEXT = ("input_ids", "attention_mask", "position_ids")
DECODER_TEXT = tuple(f"decoder_{name}" for name in TEXT)
IN_SEQUENCE = ("token_type_ids", "pixel_values", "image_patches")
IN_MEMORY = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")


def argument_names(fusion: Fusion) -> tuple[str, ...]:
    """Returns the arguments that models of a fusion style take."""
    if fusion.is_encoder_decoder:
        return (*DECODER_TEXT, "pixel_values")
    in_sequence = IN_SEQUENCE if fusion.image_in_sequence else ()
    in_memory = IN_MEMORY if fusion.image_in_memory else ()
    return tuple(dict.fromkeys((*TEXT, *in_sequence, *in_memory)))


def to_batch(
    cfg: Experiment, arrays: Arrays, image_token: int | None, generating: bool = False
) -> Batch:
    """The arguments of one forward pass -> a batch without targets.

    Args:
      image_token: the id that stands for an image token in the sequence.
      generating: positions count the tokens that are there, as `generate` of transformers has it; otherwise slots, and
        always slots in an encoder-decoder.

    Raises:
      ConfigError: the image tokens in the text do not match the images, an array is missing or has a wrong shape, or
        an id or a position is outside the model's tables.
    """
    prefix = "decoder_" if cfg.fusion.is_encoder_decoder else ""
    _check_text(arrays, prefix)
    ids = np.asarray(arrays[f"{prefix}input_ids"], np.int32)
    there = np.asarray(arrays.get(f"{prefix}attention_mask", np.ones_like(ids))).astype(bool)
    text = Batch(
        tokens=ids,
        positions=_positions(cfg, arrays, ids, there, generating),
        segment_ids=there.astype(np.int32),
        branch_ids=np.full_like(ids, TRUNK),
        image_token_index=np.full_like(ids, NO_IMAGE),
        image_mask=np.zeros((*ids.shape, 0), bool),
        block_ids=_blocks(arrays, there) if cfg.fusion.prefix == "bidirectional" else None,
    )
    if "image_patches" in arrays:  # Fuyu's older name
        arrays = {**arrays, "pixel_values": arrays["image_patches"]}
    if "pixel_values" not in arrays and not cfg.fusion.is_encoder_decoder:
        if cfg.fusion.image_in_sequence and (ids == image_token).any():
            raise ConfigError(
                f"input_ids hold image tokens (id {image_token}) without an image: give pixel_values."
            )
        batch = text
    else:
        batch = text.replace(**_images(cfg, arrays, ids, image_token))
    return _within_tables(cfg.decoder, batch)


def _check_text(arrays: Arrays, prefix: str) -> None:
    """Raises ConfigError where what is said of every token has no number for every token."""
    ids = np.asarray(arrays[f"{prefix}input_ids"])
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise ConfigError(
            f"{prefix}input_ids must be whole numbers of the shape (rows, tokens); found {ids.dtype} {ids.shape}."
        )
    for name in (f"{prefix}attention_mask", "token_type_ids"):
        if name in arrays:
            _shaped(arrays, name, ids.shape)
    if f"{prefix}position_ids" in arrays:
        positions = np.shape(arrays[f"{prefix}position_ids"])
        _shaped(
            arrays,
            f"{prefix}position_ids",
            (1 if positions[:1] == (1,) else len(ids), ids.shape[1]),
        )


def _within_tables(decoder: Decoder, batch: Batch) -> Batch:
    """The batch with the numbers of padding, which may be any, moved into the model's tables.

    A look-up outside a table gives NaN, which attention spreads over the whole row even from padding.

    Raises:
      ConfigError: an id or a learned position of a token is outside its table.
    """
    is_token, rows = batch.segment_ids > 0, decoder.vocab_size + decoder.extra_tokens
    wrong = batch.tokens[is_token & ((batch.tokens < 0) | (batch.tokens >= rows))]
    if wrong.size:
        raise ConfigError(
            f"the text has the id {wrong.max()}, but the model has only {rows} tokens."
        )
    batch = batch.replace(tokens=batch.tokens.clip(0, rows - 1))
    if decoder.positions != "learned":  # the others are computed, so that they have no end
        return batch
    most, positions = decoder.max_positions, batch.positions
    wrong = positions[is_token & ((positions < 0) | (positions >= most))]
    if wrong.size:
        raise ConfigError(
            f"the text is too long: it has a token at position {wrong.max()}, counted from 0, but the model has only "
            f"{most} positions."
        )
    return batch.replace(positions=positions.clip(0, most - 1))


def reading_own_images(batch: Batch) -> Batch:
    """A batch of Llama 3.2 Vision in which no row depends on the images of the others.

    In transformers, a token that stands before its image, or whose row has none, reads every tile of the batch's
    largest row, blank ones included. Here it reads those of its own row, as it does where the row is alone: all tiles
    of its images, or none.
    """
    tiles = batch.image_mask.shape[-1] // batch.tile_layouts.shape[1]
    own = np.repeat(batch.tile_layouts > 0, tiles, axis=1)
    return batch.replace(no_image_mask=np.broadcast_to(own[:, None], batch.image_mask.shape))


def scored(batch: Batch, counts: Sequence[int]) -> Batch:
    """A batch padded on the left, with targets, of which the last `counts` tokens of each row are scored."""
    slots, length = np.arange(batch.tokens.shape[1]), batch.tokens.shape[1]
    first = length - np.array(counts)[:, None] - 1  # the token that predicts the first of an answer
    return batch.replace(
        targets=np.roll(batch.tokens, -1, axis=1),
        loss_weights=((slots >= first) & (slots < length - 1)).astype(np.float32),
    )


def image_batch(cfg: Experiment, arrays: Arrays) -> Batch:
    """The images alone, for `VLM.image_tokens`: each is a row of its own, with tiles those of a row stay together."""
    pixels = np.asarray(arrays["pixel_values"])
    if cfg.fusion.image_in_memory:
        ids = np.zeros((len(pixels), 1), np.int32)
        images = _in_memory(
            cfg,
            {name: x for name, x in arrays.items() if name != "cross_attention_mask"},
            ids,
            None,
        )
    else:
        whole = (
            _patches(cfg, arrays)[None] if cfg.vision.kind == "none" else _whole_images(cfg, arrays)
        )
        ids, images = np.zeros((len(whole), 1), np.int32), {"images": whole[:, None]}
        images["image_mask"] = np.zeros((*ids.shape, 1), bool)
    return Batch(
        **{
            "tokens": ids,
            "positions": ids,
            "segment_ids": ids + 1,
            "branch_ids": ids,
            "image_token_index": ids - 1,
        }
        | images
    )


def _positions(
    cfg: Experiment, arrays: Arrays, ids: np.ndarray, there: np.ndarray, generating: bool
) -> np.ndarray:
    encoder_decoder = cfg.fusion.is_encoder_decoder
    given = arrays.get("decoder_position_ids" if encoder_decoder else "position_ids")
    if given is not None:
        return np.broadcast_to(np.asarray(given, np.int32), there.shape)
    if cfg.decoder.positions == "sincos":  # TrOCR skips the padding token, whatever the mask says
        counted = ids != cfg.decoder.position_offset - 1
        return np.where(counted, np.cumsum(counted, axis=1) - 1, -1).astype(np.int32)
    first = int(cfg.fusion.prefix == "bidirectional")  # PaliGemma counts from 1
    if generating and not encoder_decoder:
        return np.maximum(np.cumsum(there, axis=1) - 1, 0).astype(np.int32) + first
    return np.broadcast_to(np.arange(there.shape[1], dtype=np.int32) + first, there.shape)


def _blocks(arrays: Arrays, there: np.ndarray) -> np.ndarray:
    """The prefix, whose `token_type_ids` are 0 (without them: all that is there), is one block."""
    types = np.asarray(arrays.get("token_type_ids", np.zeros_like(there)))
    return (there & (types == 0)).astype(np.int32)


def channels_last(images: np.ndarray) -> np.ndarray:
    """(..., channels, height, width) -> (..., height, width, channels)."""
    return np.moveaxis(np.asarray(images), -3, -1)


def _images(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int | None) -> dict:
    """Returns the image fields of the batch."""
    fusion = cfg.fusion
    if fusion.image_in_sequence == fusion.image_in_memory:
        raise ConfigError(
            f"pixel_values are for models with images either in the sequence or in cross-attention, "
            f"not for fusion.kind {fusion.kind}."
        )
    to_fields = _in_sequence if fusion.image_in_sequence else _in_memory
    return to_fields(cfg, arrays, ids, image_token)


def _in_sequence(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int) -> dict:
    """Images in reading order over all rows; a row takes as many as its image tokens fill.

    The tokens under them may lie beyond the vocabulary; they become 0.
    """
    is_image = ids == image_token
    patches_only = cfg.vision.kind == "none"
    images, tokens_each = (
        (_patches(cfg, arrays), 1)
        if patches_only
        else (_whole_images(cfg, arrays), cfg.image_tokens)
    )
    counts = is_image.sum(axis=1)
    if counts.sum() != len(images) * tokens_each or (counts % tokens_each).any():
        raise ConfigError(
            f"The {' + '.join(map(str, counts))} image tokens (id {image_token}) in the rows of input_ids do not match "
            f"pixel_values: {len(images)} {'patches' if patches_only else 'images'} of {tokens_each} tokens each."
        )
    filled = _row_by_row(images, counts // tokens_each)
    if patches_only:
        filled = filled[:, None]
    return {
        "tokens": np.where(is_image, 0, ids),
        "images": filled,
        "image_token_index": np.where(is_image, np.cumsum(is_image, axis=1) - 1, NO_IMAGE).astype(
            np.int32
        ),
        "image_mask": np.zeros((*ids.shape, filled.shape[1]), bool),
    }


def _patches(cfg: Experiment, arrays: Arrays) -> np.ndarray:
    """Fuyu: (P, C) patches of all images one after another, whatever their sizes."""
    patches = np.asarray(arrays["pixel_values"])
    patches = patches.reshape(-1, patches.shape[-1])
    return _shaped({"pixel_values": patches}, "pixel_values", (None, cfg.vision.patch_dim))


def _whole_images(cfg: Experiment, arrays: Arrays) -> np.ndarray:
    """(images, height, width, channels)."""
    side = cfg.vision.image_size_px
    return channels_last(_shaped(arrays, "pixel_values", (None, CHANNELS, side, side)))


def _row_by_row(images: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(I of all rows, ...) -> (B, I of the richest row, ...), zeros where a row has fewer; there is room for one."""
    filled = np.zeros((len(counts), max(1, counts.max()), *images.shape[1:]), np.float32)
    for target, row in zip(filled, np.split(images, np.cumsum(counts)[:-1])):
        target[: len(row)] = row
    return filled


def _in_memory(cfg: Experiment, arrays: Arrays, ids: np.ndarray, image_token: int | None) -> dict:
    """One image a row, which every token reads; in tiles, as many as there are."""
    if cfg.vision.tile_layouts:
        return _in_tiles(cfg, arrays, ids)
    images = _shaped(arrays, "pixel_values", (len(ids), CHANNELS, None, None))
    return {"images": channels_last(images)[:, None], "image_mask": np.ones((*ids.shape, 1), bool)}


def _in_tiles(cfg: Experiment, arrays: Arrays, ids: np.ndarray) -> dict:
    """Llama 3.2 Vision: I images of J tiles, and per token and tile whether it is read (without a mask: all are)."""
    rows, tiles, side = len(ids), cfg.vision.tiles, cfg.vision.image_size_px
    images = _shaped(arrays, "pixel_values", (rows, None, tiles, CHANNELS, side, side))
    shape = images.shape[:3]
    layouts = _shaped(arrays, "aspect_ratio_ids", shape[:2])
    if not np.isin(layouts, range(1 + len(cfg.vision.tile_layouts))).all():
        raise ConfigError(
            f"aspect_ratio_ids {layouts.tolist()} go beyond the {len(cfg.vision.tile_layouts)} layouts."
        )
    arrays = {"cross_attention_mask": np.ones((*ids.shape, *shape[1:])), **arrays}
    read = _shaped(arrays, "cross_attention_mask", (*ids.shape, *shape[1:]))
    return {
        "images": channels_last(images),
        "tile_layouts": layouts.astype(np.int32),
        "tile_mask": _shaped(arrays, "aspect_ratio_mask", shape).astype(bool),
        "image_mask": read.reshape(*ids.shape, -1).astype(bool),
    }


def _shaped(arrays: Arrays, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The argument; ConfigError where it is missing or of another shape (None: any length)."""
    found = np.shape(arrays.get(name))
    if len(found) != len(shape) or any(n not in (None, length) for n, length in zip(shape, found)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ConfigError(
            f"{name} must be there with the shape ({wanted}); found {found or 'none'}."
        )
    return np.asarray(arrays[name])
