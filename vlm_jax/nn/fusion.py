"""How image tokens reach the decoder, and every attention mask.

unified            x: [i i i i t t t]                  memory: none
cross_attention    x: [t t t]                          memory: [i i i i], behind gates
encoder_decoder    x: [t t t]                          memory: [i i i i], in every block
hybrid             x: [i i t t t]                      memory: [i i i i], behind gates
text_only          x: [t t t]                          memory: none

Of an image in tiles, hybrid has the thumbnail in x and the tiles in memory (NVLM-H; Dai et al. 2024, section 4), the
others have both in one place. An image that is one tile is in both places of hybrid.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.config import Model
from vlm_jax.structs import (
    NO_IMAGE,
    PADDING,
    TRUNK,
    Batch,
    Cache,
    DecoderInputs,
)

Ids = Int[Array, "B S"]
KeyIds = Int[Array, "B T"]


def fuse(
    cfg: Model,
    text: Float[Array, "B S D"],
    image: Float[Array, "B T E"] | None,
    batch: Batch,
    cache: Cache | None = None,
) -> DecoderInputs:
    """Embedded text and the I*M image tokens of each row -> what the decoder sees; I counts every view of an image.

    While decoding, `image` is None: its tokens, or their keys and values, are in the cache already.
    """
    reads_memory = cfg.fusion.image_in_memory and batch.image_mask.shape[-1] > 0
    in_sequence = cfg.fusion.image_in_sequence and image is not None
    window = cfg.decoder.sliding_window if cfg.decoder.sliding_layers else 0
    stream = DecoderInputs(
        x=place(text, image, batch.image_token_index) if in_sequence else text,
        positions=batch.positions,
        mask=self_attention_mask(batch, cache),
        local_mask=self_attention_mask(batch, cache, window) if window else None,
    )
    if not reads_memory:
        return stream
    if cfg.fusion.splits_views:
        image = None if image is None else without_thumbnails(cfg, image, 1, cfg.image_tokens)
        batch = batch.replace(image_mask=without_thumbnails(cfg, batch.image_mask, 2))
    stream = stream.replace(memory=image, reads=batch.image_mask.any(-1))
    if cfg.fusion.tokens_without_image == "attend_all":
        batch = batch.replace(image_mask=open_blind(batch))
        stream = stream.replace(attends=batch.image_mask.any(-1))
    return stream.replace(memory_mask=memory_mask(batch, cfg.image_tokens))


def open_blind(batch: Batch) -> Bool[Array, "B S I"]:
    """`image_mask`, in which a token that may read no image reads those of its `no_image_mask`."""
    is_blind = ~batch.image_mask.any(-1, keepdims=True)
    return batch.image_mask | (
        is_blind if batch.no_image_mask is None else is_blind & batch.no_image_mask
    )


def without_thumbnails(cfg: Model, x: Array, axis: int, each: int = 1) -> Array:
    """Keeps what belongs to tiles along an axis of `each` entries for every view of every image."""
    vision = cfg.vision
    apart = x.reshape(*x.shape[:axis], -1, vision.views, each, *x.shape[axis + 1 :])
    tiles = jax.lax.slice_in_dim(apart, 0, vision.cut_tiles, axis=axis + 1)
    return tiles.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def place(
    text: Float[Array, "B S D"], image: Float[Array, "B T D"], slots: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Puts image token `slots` where it stands in the sequence; text stays where the slot says NO_IMAGE."""
    found = jnp.take_along_axis(image, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where((slots == NO_IMAGE)[..., None], text, found)


def self_attention_mask(
    batch: Batch, cache: Cache | None = None, window: int = 0
) -> Bool[Array, "B 1 S T"]:
    """Which tokens of the sequence, or of the cache's T slots, each token sees.

    Drawn for a row of two segments, the first a trunk of two and two branches of two:

        segment 1 1 1 1 1 1 2 2      1 . . . . . . .
        branch  0 0 1 1 2 2 0 0      1 1 . . . . . .
                                     1 1 1 . . . . .
                                     1 1 1 1 . . . .
                                     1 1 . . 1 . . .
                                     1 1 . . 1 1 . .
                                     . . . . . . 1 .
                                     . . . . . . 1 1

    A `window` leaves only keys less than so many positions before the token (Beltagy et al. 2020, section 3.1; 0: all).
    Tokens of one block (`block_ids`) see each other besides: later ones, and those of another branch or outside the
    window, too.
    """
    keys, first_slot = (batch, 0) if cache is None else (cache, cache.index)
    slots = first_slot + jnp.arange(batch.tokens.shape[1])
    visible = (slots[:, None] >= jnp.arange(keys.segment_ids.shape[1]))[None]
    visible &= _same(batch.branch_ids, keys.branch_ids) | (keys.branch_ids == TRUNK)[:, None]
    if window:
        visible &= batch.positions[:, :, None] - keys.positions[:, None] < window
    if batch.block_ids is not None:
        visible |= _same(batch.block_ids, keys.block_ids) & (batch.block_ids > 0)[..., None]
    visible &= _same(batch.segment_ids, keys.segment_ids) & (keys.segment_ids != PADDING)[:, None]
    return visible[:, None]


def _same(ids: Ids, key_ids: KeyIds) -> Bool[Array, "B S T"]:
    return ids[:, :, None] == key_ids[:, None]


def text_mask(there: Bool[Array, "B S"], causal: bool) -> Bool[Array, "B 1 #S T"]:
    """Where there is nothing but one text a row: a token sees what is there, and if `causal`, nothing after itself."""
    visible = there[:, None, None]
    return visible & jnp.tri(there.shape[1], dtype=bool) if causal else visible


def memory_mask(batch: Batch, tokens_per_image: int) -> Bool[Array, "B 1 S T"]:
    """Which image tokens each text token reads: all M of every image in its `image_mask`."""
    return jnp.repeat(batch.image_mask, tokens_per_image, axis=-1)[:, None]
