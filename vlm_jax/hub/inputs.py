"""Converts model inputs, named and laid out as in transformers, to a `Batch`.

The names are `input_ids`, `attention_mask`, `position_ids`, `token_type_ids`, `pixel_values` (or
`image_patches`), `pixel_attention_mask`, `spatial_shapes`, `image_sizes`, `batch_num_images`,
`aspect_ratio_ids`, `aspect_ratio_mask`, `cross_attention_mask`, `image_attention_mask`,
`image_grid_thw`, `mm_token_type_ids`, `decoder_input_ids`, `decoder_attention_mask` and
`decoder_position_ids`. Images are (..., channels, height, width), except Fuyu's, which are patches
flattened in the order (row, column, channel), and at native resolution (Qwen2-VL), which are
patches of all images in the order (channel, frame, row, column). Those of Idefics and Idefics3 are
rows of images, with blank ones at the end. LLaVA-NeXT's are views of images, the whole image first;
blank ones may be at the end.
"""

from collections.abc import Sequence

import numpy as np

from vlm_jax.config import (
    ConfigError,
    Decoder,
    Experiment,
    Fusion,
)
from vlm_jax.hub.image_inputs import IMAGE_MASKS, Arrays, checked_array, image_fields, native_fields
from vlm_jax.structs import NO_IMAGE, Batch

TEXT = ("input_ids", "attention_mask", "position_ids")
DECODER_TEXT = tuple(f"decoder_{name}" for name in TEXT)
IN_SEQUENCE = ("token_type_ids", "pixel_values", "pixel_attention_mask", "image_patches")
NATIVE = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "image_sizes")
IN_TILE_MAPS = ("image_sizes", "batch_num_images")
IN_MEMORY = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", *IMAGE_MASKS)


def argument_names(cfg: Experiment) -> tuple[str, ...]:
    """Returns the arguments that a model takes."""
    fusion = cfg.fusion
    if cfg.vision.is_native and fusion.has_images:
        return (*TEXT, *NATIVE)
    if fusion.is_encoder_decoder:
        return (*DECODER_TEXT, "pixel_values")
    in_sequence = IN_SEQUENCE if fusion.image_in_sequence else ()
    in_memory = IN_MEMORY if fusion.image_in_memory else ()
    in_tile_maps = IN_TILE_MAPS if cfg.vision.tile_grids else ()
    return tuple(dict.fromkeys((*TEXT, *in_sequence, *in_memory, *in_tile_maps)))


def to_batch(
    cfg: Experiment, arrays: Arrays, image_token: int | None, generating: bool = False
) -> Batch:
    """Returns the batch of one forward pass, without targets.

    Args:
      image_token: id of the image placeholder in the sequence.
      generating: counts positions over the tokens that are not padding, like `generate` of
        transformers, and `forward` with `Family.counts_positions`. Otherwise, and always in an
        encoder-decoder, positions are slot indices.

    Raises:
      ConfigError: the image tokens in the text do not match the images, an array is missing or has
        a wrong shape, or an id or a position is outside the model's tables.
    """
    prefix = "decoder_" if cfg.fusion.is_encoder_decoder else ""
    _check_text(arrays, prefix)
    ids = np.asarray(arrays[f"{prefix}input_ids"], np.int32)
    is_token = np.asarray(arrays.get(f"{prefix}attention_mask", np.ones_like(ids))).astype(bool)
    text = Batch(
        tokens=ids,
        positions=_positions(cfg, arrays, ids, is_token, generating),
        segment_ids=is_token.astype(np.int32),
        image_token_index=np.full_like(ids, NO_IMAGE),
        image_mask=np.zeros((*ids.shape, 0), bool),
        block_ids=_blocks(cfg.fusion, arrays, is_token),
    )
    # The older name of Fuyu's images.
    if "image_patches" in arrays:
        arrays = {**arrays, "pixel_values": arrays["image_patches"]}
    if "pixel_values" not in arrays and not cfg.fusion.is_encoder_decoder:
        if cfg.fusion.image_in_sequence and (ids == image_token).any():
            raise ConfigError(
                f"input_ids hold image tokens (id {image_token}) without an image: give "
                "pixel_values."
            )
        batch = text
    elif cfg.vision.is_native:
        batch = text.replace(**native_fields(cfg, arrays, is_token, image_token))
    else:
        batch = text.replace(**image_fields(cfg, arrays, ids, image_token))
    return _within_tables(cfg.decoder, batch)


def _check_text(arrays: Arrays, prefix: str) -> None:
    """Raises ConfigError if an argument about tokens does not have one number for each token."""
    ids = np.asarray(arrays[f"{prefix}input_ids"])
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise ConfigError(
            f"{prefix}input_ids must be whole numbers of the shape (rows, tokens); found "
            f"{ids.dtype} {ids.shape}."
        )
    for name in (f"{prefix}attention_mask", "token_type_ids"):
        if name in arrays:
            checked_array(arrays, name, ids.shape)
    if f"{prefix}position_ids" in arrays:
        positions = np.shape(arrays[f"{prefix}position_ids"])
        checked_array(
            arrays,
            f"{prefix}position_ids",
            (1 if positions[:1] == (1,) else len(ids), ids.shape[1]),
        )


def _within_tables(decoder: Decoder, batch: Batch) -> Batch:
    """Clips ids and positions of padding, which may be any number, to the model's tables.

    A lookup outside a table gives NaN, which attention spreads over the whole row even from
    padding.

    Raises:
      ConfigError: an id or a position of a token is outside its table.
    """
    is_token, rows = batch.segment_ids > 0, decoder.num_ids
    wrong = batch.tokens[is_token & ((batch.tokens < 0) | (batch.tokens >= rows))]
    if wrong.size:
        raise ConfigError(
            f"the text has the id {wrong.max()}, but the model has only {rows} tokens."
        )
    batch = batch.replace(tokens=batch.tokens.clip(0, rows - 1))
    # Most other positions are computed, so they have no upper bound.
    if not decoder.limits_positions:
        return batch
    max_positions, positions = decoder.max_positions, batch.positions
    wrong = positions[is_token & ((positions < 0) | (positions >= max_positions))]
    if wrong.size:
        raise ConfigError(
            f"the text is too long: it has a token at position {wrong.max()}, counted from 0, but "
            f"the model has only {max_positions} positions."
        )
    return batch.replace(positions=positions.clip(0, max_positions - 1))


def mask_images_of_other_rows(batch: Batch) -> Batch:
    """Makes the rows of a Llama 3.2 Vision batch independent of each other's images.

    In transformers, a token before its image, or in a row without images, attends to every tile of
    the row with the most tiles, blank tiles included. Here it attends to the tiles of its own row
    (all of them, or none), as it does in a batch of one.
    """
    tiles = batch.image_mask.shape[-1] // batch.tile_layouts.shape[1]
    own = np.repeat(batch.tile_layouts > 0, tiles, axis=1)
    return batch.replace(no_image_mask=np.broadcast_to(own[:, None], batch.image_mask.shape))


def with_targets(batch: Batch, counts: Sequence[int]) -> Batch:
    """Adds targets to a left-padded batch, and scores the last `counts` tokens of each row."""
    length = batch.tokens.shape[1]
    slots = np.arange(length)
    # The slot that predicts the first token of the answer.
    first = length - np.array(counts)[:, None] - 1  # (B, 1)
    return batch.replace(
        targets=np.roll(batch.tokens, -1, axis=1),
        loss_weights=((slots >= first) & (slots < length - 1)).astype(np.float32),
    )


def _positions(
    cfg: Experiment, arrays: Arrays, ids: np.ndarray, is_token: np.ndarray, generating: bool
) -> np.ndarray:
    is_encoder_decoder = cfg.fusion.is_encoder_decoder
    stated = arrays.get("decoder_position_ids" if is_encoder_decoder else "position_ids")
    if stated is not None:
        return np.broadcast_to(np.asarray(stated, np.int32), is_token.shape)
    # TrOCR skips the padding token, whatever the mask.
    if cfg.decoder.positions == "sincos":
        counted = ids != cfg.decoder.position_offset - 1
        return np.where(counted, np.cumsum(counted, axis=1) - 1, -1).astype(np.int32)
    # PaliGemma counts from 1.
    first = int(cfg.fusion.is_prefix_lm)
    if generating and not is_encoder_decoder:
        return np.maximum(np.cumsum(is_token, axis=1) - 1, 0).astype(np.int32) + first
    return np.broadcast_to(np.arange(is_token.shape[1], dtype=np.int32) + first, is_token.shape)


def _blocks(fusion: Fusion, arrays: Arrays, is_token: np.ndarray) -> np.ndarray | None:
    """Block ids by `token_type_ids`; None: attention is causal.

    PaliGemma: 1 for the prefix, whose type is 0 (by default: every token). Gemma 3: 1, 2, ... for
    runs of image tokens, whose type is 1; without types there is no block, as in transformers.
    """
    types = arrays.get("token_type_ids")
    if fusion.is_prefix_lm:
        types = np.zeros_like(is_token) if types is None else np.asarray(types)
        return (is_token & (types == 0)).astype(np.int32)
    if types is None or not fusion.has_image_blocks:
        return None
    is_image = is_token & (np.asarray(types) == 1)
    begins = is_image & ~np.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    return np.where(is_image, np.cumsum(begins, axis=1), 0).astype(np.int32)
