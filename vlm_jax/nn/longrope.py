"""LongRoPE (Ding et al. 2024), as in Phi-3: its frequencies, and what they do to a KV cache.

Every frequency has two factors. A text of at most `rope.original_positions` tokens uses the short
ones; a longer text uses the long ones for all of its tokens, the first included (transformers,
modeling_phi3.py).

While decoding, one token can therefore change the rotation of all tokens before it, and through
the blocks all of their keys and values: the cache is stale from that token on. The embeddings do
not depend on the factors, so the cache records them, and the decoder recomputes the keys and
values from them once.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.config import Rope
from vlm_jax.structs import Cache, DecoderInputs


def may_recompute(rope: Rope) -> bool:
    """True if a token can make the cached keys and values stale."""
    return rope.scaling == "longrope"


def scale_inv_freq(
    inv_freq: Float[np.ndarray, "half"], positions: Int[Array, "B S"], rope: Rope
) -> Float[Array, "half"]:
    """Divides the inverse frequencies by the short or the long factors."""
    short = inv_freq / np.float32(rope.short_factors)
    long = inv_freq / np.float32(rope.long_factors)
    return jnp.where(_is_long(positions, rope), long, short)


def attention_factor(rope: Rope) -> float:
    """Factor of cosines and sines, for short texts too (as in transformers)."""
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions))


def prepare_cache(
    rope: Rope, inputs: DecoderInputs, cache: Cache | None
) -> tuple[Cache | None, Bool[Array, ""] | None]:
    """Prepares the cache for a forward pass over `inputs`.

    Returns:
      The cache, with `inputs` recorded if they may be needed again, and whether its keys and values
      are stale and must be recomputed; None: they never are.
    """
    has_room_for_long = cache is not None and cache.positions.shape[1] >= rope.original_positions
    if not may_recompute(rope) or not has_room_for_long:
        return cache, None
    is_prefill = cache.inputs is None
    cache = _record(inputs, cache)
    if is_prefill:
        return cache, None
    is_cached = jnp.arange(cache.positions.shape[1]) < cache.index
    cached_positions = jnp.where(is_cached, cache.positions, 0)
    return cache, ~_is_long(cached_positions, rope) & _is_long(inputs.positions, rope)


def _is_long(positions, rope: Rope):
    return positions.max() + 1 > rope.original_positions


def _record(inputs: DecoderInputs, cache: Cache) -> Cache:
    """Writes `inputs` into `cache.inputs`, which has every slot of the cache, from `index` on."""
    slots = cache.positions.shape[1]

    def empty(x):
        axis = _slot_axis(x)
        return jnp.zeros((*x.shape[:axis], slots, *x.shape[axis + 1 :]), x.dtype)

    def write(x, buffer):
        return jax.lax.dynamic_update_slice_in_dim(buffer, x, cache.index, _slot_axis(x))

    # The keys and values of the image tokens have no positions and stay valid.
    inputs = inputs.replace(memory=None, deepstack_memory=None)
    buffers = jax.tree.map(empty, inputs) if cache.inputs is None else cache.inputs
    if buffers.deepstack is not None and inputs.deepstack is None:
        # No token of an answer is an image token.
        levels = jnp.zeros((len(buffers.deepstack), *inputs.x.shape), inputs.x.dtype)
        inputs = inputs.replace(deepstack=levels)
    return cache.replace(inputs=jax.tree.map(write, inputs, buffers))


def _slot_axis(x) -> int:
    """Axis of S: 1 in (B, S, ...), 2 in masks (B, 1, S, T) and DeepStack (L, B, S, D)."""
    return 1 if x.ndim < 4 else 2
