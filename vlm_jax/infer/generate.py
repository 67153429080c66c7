"""Cached generation: one prefill over the prompts, then a compiled loop of single tokens with static shapes."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.config import Experiment
from vlm_jax.nn.vlm import VLM, empty_cache
from vlm_jax.structs import NO_IMAGE, Batch


@functools.partial(jax.jit, static_argnames=("cfg", "new_tokens", "eos"))
def generate(cfg: Experiment, params, prompt: Batch, new_tokens: int, eos: int) -> Int[Array, "B new"]:
    """The most likely next tokens of left-padded prompts, at most `new_tokens` each; after `eos` come only `eos`.

    The loop ends when every row has ended.
    """
    model = VLM(cfg)
    dtype = params["decoder"]["embedding"]["table"].dtype
    out = model.apply({"params": params}, prompt, empty_cache(cfg, prompt, new_tokens, dtype))
    token = jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32)
    made = jnp.full((len(token), new_tokens), eos, jnp.int32).at[:, 0].set(token)
    last = jax.tree.map(lambda x: x[:, -1:], prompt.replace(images=None))

    def unfinished(carry):
        count, token, _, _ = carry
        return (count < new_tokens) & jnp.any(token != eos)

    def one_more(carry):
        count, token, made, cache = carry
        batch = last.replace(
            tokens=token[:, None],
            positions=last.positions + count,
            image_slots=jnp.full_like(last.image_slots, NO_IMAGE),
            block_ids=None if last.block_ids is None else jnp.zeros_like(last.block_ids),
        )
        out = model.apply({"params": params}, batch, cache)
        following = jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32)
        following = jnp.where(token == eos, eos, following)
        return count + 1, following, made.at[:, count].set(following), out.cache

    return jax.lax.while_loop(unfinished, one_more, (jnp.int32(1), token, made, out.cache))[2]
