"""Fusion styles: how image tokens reach the decoder, and all attention masks.

unified            x: [i i i i t t t]                  memory: none
cross_attention    x: [t t t]                          memory: [i i i i], behind gates
encoder_decoder    x: [t t t]                          memory: [i i i i], in every block
hybrid             x: [i i t t t]                      memory: [i i i i], behind gates
text_only          x: [t t t]                          memory: none

If an image has several tiles, hybrid puts its thumbnail into x and its tiles into memory (NVLM-H;
Dai et al. 2024, section 4). The other styles keep all of them together. An image of one tile is in
both places of hybrid.

DeepStack (`vision.deepstack_layers`; Qwen3-VL, after Meng et al. 2024) projects L more hidden
states of the encoder, the levels. In x, level i is added to the image tokens after decoder block
i < L. Memory has no hidden states to add it to: level i is the memory of cross-attention i < L, and
the later ones read the encoder's output. Hybrid does both. While decoding, all are in the KV cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.config import Model
from vlm_jax.structs import (
    ANY_LAYOUT,
    NEWLINE,
    NO_IMAGE,
    ONE_SEGMENT,
    PADDING,
    TRUNK,
    Batch,
    Cache,
    DecoderInputs,
    MapMemory,
    SegmentPattern,
    of_token_rows,
)

Ids = Int[Array, "B S"]
KeyIds = Int[Array, "B T"]


def fuse(
    cfg: Model,
    text: Float[Array, "B S D"],
    image: Float[Array, "B T E"] | None,
    batch: Batch,
    cache: Cache | None = None,
    newline: Float[Array, "D"] | None = None,
) -> DecoderInputs:
    """Combines text embeddings and image tokens into the decoder's inputs.

    Args:
      text: embedded tokens.
      image: the image tokens of each row: M for every view of an image, or at native resolution as
        many as each image has; None while decoding, when the image tokens, or their keys and
        values, are in the cache.
      newline: with `vision.tile_grids`, the vector that ends each row of a map.
    """
    has_memory = cfg.fusion.image_in_memory and batch.image_mask.shape[-1] > 0
    in_sequence = cfg.fusion.image_in_sequence and image is not None
    local_mask = window = None
    if cfg.decoder.sliding_layers:
        window = cfg.decoder.sliding_window
        local_mask = self_attention_mask(
            batch, cache, window, limits_blocks=cfg.fusion.has_image_blocks
        )
    x, deepstack, levels = text, None, []
    if image is not None and cfg.vision.deepstack_layers:
        image, *levels = jnp.split(image, 1 + len(cfg.vision.deepstack_layers), axis=-1)
    if in_sequence and levels:
        zeros = jnp.zeros_like(text)
        index = batch.image_token_index
        deepstack = jnp.stack([insert_image_tokens(zeros, level, index) for level in levels])
    if in_sequence:
        x = insert_image_tokens(
            *(text, image, batch.image_token_index, newline, batch.image_taps, batch.tap_weights)
        )
    inputs = DecoderInputs(
        x=x,
        positions=batch.positions,
        rope_positions=batch.rope_positions,
        deepstack=deepstack,
        mask=self_attention_mask(batch, cache),
        pattern=causal_pattern(batch, cache, window),
        local_mask=local_mask,
    )
    if not has_memory:
        return inputs

    # The thumbnails are in the sequence, so cross-attention has the tiles alone.
    has_maps = batch.map_memory is not None
    if cfg.fusion.splits_views and not cfg.vision.is_native:
        if image is not None and not has_maps:
            image = without_thumbnails(cfg, image, axis=1, tokens=cfg.image_tokens)
        batch = batch.replace(image_mask=without_thumbnails(cfg, batch.image_mask, axis=2))
    if image is not None and has_maps:
        image = map_tiles(image, of_token_rows(batch, batch.map_memory), newline)
    inputs = inputs.replace(
        memory=image,
        deepstack_memory=jnp.stack(levels) if levels else None,
        has_image=batch.image_mask.any(-1),
    )

    if cfg.fusion.tokens_without_image == "attend_all":
        batch = batch.replace(image_mask=mask_tokens_without_image(batch))
        inputs = inputs.replace(attends=batch.image_mask.any(-1))
    has_equal_numbers = not cfg.has_tokens_by_size and not has_maps
    if batch.image_mask.shape[-1] == 1 and has_equal_numbers:
        # A token attends to all of the image, or the sublayer adds nothing to it.
        return inputs
    patches = cfg.vision.patch_square**2 if cfg.has_tokens_by_size else None
    return inputs.replace(memory_mask=cross_attention_mask(batch, cfg.image_tokens, patches))


def mask_tokens_without_image(batch: Batch) -> Bool[Array, "B S I"]:
    """`image_mask` in which tokens without an image attend to the images of `no_image_mask`."""
    has_no_image = ~batch.image_mask.any(-1, keepdims=True)
    if batch.no_image_mask is None:
        return batch.image_mask | has_no_image
    return batch.image_mask | (has_no_image & batch.no_image_mask)


def without_thumbnails(cfg: Model, x: Array, axis: int, tokens: int = 1) -> Array:
    """Keeps the entries of tiles along an axis that has `tokens` entries for each view."""
    vision = cfg.vision
    by_view = x.reshape(*x.shape[:axis], -1, vision.views, tokens, *x.shape[axis + 1 :])
    tiles = jax.lax.slice_in_dim(by_view, 0, vision.cut_tiles, axis=axis + 1)
    return tiles.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def insert_image_tokens(
    text: Float[Array, "B S D"],
    image: Float[Array, "B T D"],
    index: Int[Array, "B S"],
    newline: Float[Array, "D"] | None = None,
    taps: Int[Array, "B S 4"] | None = None,
    weights: Float[Array, "B S 4"] | None = None,
) -> Float[Array, "B S D"]:
    """Replaces text embeddings by image token `index` unless it is NO_IMAGE.

    With `taps` and `weights` it is the weighted sum of four image tokens instead.
    """
    if taps is None:
        image_at = take_image_tokens(image, index)
    else:
        image_at = interpolate_image_tokens(image, taps, weights)
    if newline is not None:
        newline = newline.astype(image.dtype)
        image_at = jnp.where((index == NEWLINE)[..., None], newline, image_at)
    return jnp.where((index == NO_IMAGE)[..., None], text, image_at)


def take_image_tokens(
    image: Float[Array, "B T D"], index: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Returns the image token of each slot; slots without one get any."""
    return jnp.take_along_axis(image, jnp.maximum(index, 0)[..., None], axis=1)


def interpolate_image_tokens(
    image: Float[Array, "B T D"], taps: Int[Array, "B S 4"], weights: Float[Array, "B S 4"]
) -> Float[Array, "B S D"]:
    """Returns the weighted sum of the four image tokens of each slot."""
    total = 0.0
    for tap in range(taps.shape[-1]):
        weight = weights[..., tap, None].astype(image.dtype)
        total = total + weight * take_image_tokens(image, taps[..., tap])
    return total


def map_tiles(
    image: Float[Array, "B length D"], memory: MapMemory, newline: Float[Array, "D"]
) -> Float[Array, "B T D"]:
    """Puts the image tokens of tiles together to the maps that cross-attention reads.

    Keys of padding are 0. Cross-attention is blind to the order of its keys: a vector that ends a
    row of a map is one more key.
    """
    zeros = jnp.zeros((*memory.index.shape, image.shape[-1]), image.dtype)
    return insert_image_tokens(zeros, image, memory.index, newline, memory.taps, memory.weights)


def self_attention_mask(
    batch: Batch,
    cache: Cache | None = None,
    window: int | None = None,
    limits_blocks: bool = False,
) -> Bool[Array, "B 1 S T"]:
    """Attention mask over the tokens of the sequence, or over the T slots of the cache.

    Drawn for a row of two segments, the first a trunk of two and two branches of two:

        segment 1 1 1 1 1 1 2 2      1 . . . . . . .
        branch  0 0 1 1 2 2 0 0      1 1 . . . . . .
                                     1 1 1 . . . . .
                                     1 1 1 1 . . . .
                                     1 1 . . 1 . . .
                                     1 1 . . 1 1 . .
                                     . . . . . . 1 .
                                     . . . . . . 1 1

    With a `window` keys must be less than `window` positions before the token (Beltagy et al. 2020,
    section 3.1). Tokens of one block (`block_ids`) also attend to each other in both directions,
    across branches and, unless the window `limits_blocks`, beyond it (transformers,
    `create_masks_for_vision_model` of models/gemma3).
    """
    keys, first_slot = (batch, 0) if cache is None else (cache, cache.index)
    slots = first_slot + jnp.arange(batch.tokens.shape[1])
    visible = (slots[:, None] >= jnp.arange(keys.segment_ids.shape[1]))[None]
    if batch.branch_ids is not None:
        visible &= _same(batch.branch_ids, keys.branch_ids) | (keys.branch_ids == TRUNK)[:, None]
    reaches = True
    if window is not None:
        reaches = batch.positions[:, :, None] - keys.positions[:, None] < window
        visible &= reaches
    if batch.block_ids is not None:
        in_block = _same(batch.block_ids, keys.block_ids) & (batch.block_ids > 0)[..., None]
        visible |= in_block & reaches if limits_blocks else in_block
    visible &= _same(batch.segment_ids, keys.segment_ids) & (keys.segment_ids != PADDING)[:, None]
    return visible[:, None]


def causal_pattern(
    batch: Batch, cache: Cache | None = None, window: int | None = None
) -> SegmentPattern | None:
    """Returns the pattern of `self_attention_mask` if it is causal within segments, nothing else.

    None: with a cache, with branches or blocks, or with a `window` over positions that need not
    follow each other as the slots do.
    """
    if cache is not None or batch.branch_ids is not None or batch.block_ids is not None:
        return None
    if window is not None and batch.layout == ANY_LAYOUT:
        return None
    return SegmentPattern(batch.segment_ids, window, one_segment=batch.layout == ONE_SEGMENT)


def _same(ids: Ids, key_ids: KeyIds) -> Bool[Array, "B S T"]:
    return ids[:, :, None] == key_ids[:, None]


def text_mask(is_token: Bool[Array, "B S"], causal: bool) -> Bool[Array, "B 1 #S T"]:
    """Attention mask of one text per row: a padding mask, and a causal mask if `causal`."""
    visible = is_token[:, None, None]
    return visible & jnp.tri(is_token.shape[1], dtype=bool) if causal else visible


def cross_attention_mask(
    batch: Batch, tokens_per_image: int, patches_per_token: int | None = None
) -> Bool[Array, "B 1 S T"]:
    """Attention mask over image tokens: all tokens of each image in a token's `image_mask`.

    Args:
      tokens_per_image: M, unless images have unequal numbers of tokens: in maps of tiles, and with
        `patches_per_token`.
      patches_per_token: number of patches of a token at native resolution; None: an image has M
        tokens.
    """
    if batch.map_memory is not None:
        images = batch.map_memory.views  # (B, T)
    elif patches_per_token is not None:
        images = batch.patch_images[:, ::patches_per_token]  # (B, T)
    else:
        return jnp.repeat(batch.image_mask, tokens_per_image, axis=-1)[:, None]
    images = of_token_rows(batch, images)
    # Image 0 is padding, which no token reads.
    mask = jnp.pad(batch.image_mask, ((0, 0), (0, 0), (1, 0)))
    return jnp.take_along_axis(mask, images[:, None], axis=-1)[:, None]
