"""How image tokens reach the decoder, and every attention mask.

unified            x: [i i i i t t t]                  memory: none
cross_attention    x: [t t t]                          memory: [i i i i], behind gates
encoder_decoder    x: [t t t]                          memory: [i i i i], in every block
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.config import Experiment
from vlm_jax.structs import NO_IMAGE, PADDING, TRUNK, Batch, Cache, Stream

Ids = Int[Array, "B S"]
KeyIds = Int[Array, "B T"]


def fuse(
    cfg: Experiment,
    text: Float[Array, "B S D"],
    image: Float[Array, "B T D"] | None,
    batch: Batch,
    cache: Cache | None = None,
) -> Stream:
    """Embedded text and the I*M image tokens of each row -> what the decoder sees.

    While decoding, `image` is None: its tokens, or their keys and values, are in the cache already.
    """
    reads_memory = cfg.fusion.image_in_memory and batch.image_mask.shape[-1] > 0
    in_sequence = cfg.fusion.image_in_sequence and image is not None
    return Stream(
        x=place(text, image, batch.image_slots) if in_sequence else text,
        positions=batch.positions,
        mask=sequence_mask(batch, cache),
        memory=image if reads_memory else None,
        memory_mask=memory_mask(batch, cfg.image_tokens) if reads_memory else None,
    )


def place(text: Float[Array, "B S D"], image: Float[Array, "B T D"], slots: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Puts image token `slots` where it stands in the sequence; text stays where the slot says NO_IMAGE."""
    found = jnp.take_along_axis(image, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where((slots == NO_IMAGE)[..., None], text, found)


def sequence_mask(batch: Batch, cache: Cache | None = None) -> Bool[Array, "B 1 S T"]:
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
    """
    if cache is None:
        keys, first_slot = batch, 0
    else:
        keys, first_slot = cache, cache.index
    slots = first_slot + jnp.arange(batch.tokens.shape[1])
    earlier = slots[:, None] >= jnp.arange(keys.segment_ids.shape[1])
    return (earlier & _together(batch.segment_ids, batch.branch_ids, keys.segment_ids, keys.branch_ids))[:, None]


def _together(segment: Ids, branch: Ids, key_segment: KeyIds, key_branch: KeyIds) -> Bool[Array, "B S T"]:
    """Same segment, and the key stands on the trunk or on the token's own branch."""
    same_segment = (segment[:, :, None] == key_segment[:, None]) & (key_segment != PADDING)[:, None]
    same_branch = (branch[:, :, None] == key_branch[:, None]) | (key_branch == TRUNK)[:, None]
    return same_segment & same_branch


def memory_mask(batch: Batch, tokens_per_image: int) -> Bool[Array, "B 1 S T"]:
    """Which image tokens each text token reads: all M of every image in its `image_mask`."""
    return jnp.repeat(batch.image_mask, tokens_per_image, axis=-1)[:, None]
