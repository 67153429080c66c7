"""Cached generation: a prefill of the prompts, then one token at a time with static shapes.

`generate` runs the whole loop on the device; `stream` returns every token as soon as it is chosen.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.config import Model, NonFiniteError
from vlm_jax.nn import longrope
from vlm_jax.nn.positions import continued_rope_positions
from vlm_jax.nn.vlm import VLM, empty_cache
from vlm_jax.structs import NO_IMAGE, Batch, Cache, map_token_fields, without_images


@runtime_checkable
class Sampling(Protocol):
    """Chooses the next token of every row."""

    eos: tuple[int, ...]  # ids that end a text; the first of them pads a row after its end

    def draw(self, logits: Float[Array, "B V"], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns a token for each row (B,), and the key of the next draw."""


@dataclass(frozen=True)
class SamplingParams:
    """Settings that choose the next token and end a text."""

    # Ids that end a text; the first of them pads a row after its end.
    eos: tuple[int, ...] = ()
    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    # Only the most likely tokens that together have this probability (Holtzman et al. 2020).
    top_p: float = 1.0

    def draw(self, logits: Float[Array, "B V"], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns a token for each row (B,), and the key of the next draw."""
        key, now = jax.random.split(key)
        return choose(logits, now, self), key


@struct.dataclass
class DecodeState:
    """State of a batch that changes from token to token."""

    count: jax.Array  # () int32: number of generated tokens
    token: jax.Array  # (B,) int32: the last one
    ended: jax.Array  # (B,) bool
    failed: jax.Array  # (B,) int32: the first token, from 1, whose logits are not finite; 0: none
    cache: Cache
    key: jax.Array


class NonFiniteLogits(NonFiniteError):
    """Logits that are NaN or infinite: no token can be chosen.

    Attributes:
      token: number of the token, from 1.
      row: row of the batch, from 0.
    """

    def __init__(self, token: int, row: int, dtype: np.dtype, prompt: str = ""):
        name = prompt or f"row {row + 1}"
        reason = "the weights are damaged"
        if dtype != np.float32:
            reason += f", or hidden states overflow {dtype}: load the parameters in float32"
        super().__init__(f"the logits of token {token} of {name} are NaN or infinite: {reason}.")
        self.token, self.row, self.dtype = token, row, dtype

    def about(self, prompt: str) -> "NonFiniteLogits":
        """Returns the same failure, with the prompt named instead of the row unless it is empty."""
        return NonFiniteLogits(self.token, self.row, self.dtype, repr(prompt) if prompt else "")


def choose(
    logits: Float[Array, "B V"], key: jax.Array, sampling: SamplingParams
) -> Int[Array, "B"]:
    """Chooses one token for each row."""
    if not sampling.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits = truncate(logits, sampling.top_k, sampling.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def truncate(logits: Float[Array, "B V"], top_k, top_p) -> Float[Array, "B V"]:
    """Sets the logits outside `top_k` and `top_p` to -inf; each is a number or (B, 1)."""
    size = logits.shape[-1]
    descending = jnp.sort(logits, axis=-1)[:, ::-1]
    is_kept = jnp.arange(size) < jnp.where(top_k == 0, size, top_k)
    descending = jnp.where(is_kept, descending, -jnp.inf)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding may keep the sum below 1.
    is_kept &= (before < top_p) | (jnp.asarray(top_p) >= 1)
    least = jnp.min(jnp.where(is_kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def prefill(
    cfg: Model,
    params,
    prompt: Batch,
    new_tokens: int,
    sampling: SamplingParams,
    key: jax.Array,
) -> DecodeState:
    """Runs the left-padded prompts through the model, and chooses the first token of each."""
    cache = empty_cache(cfg, prompt, new_tokens, params_dtype(params))
    logits, cache = VLM(cfg).apply({"params": params}, prompt, cache, method=VLM.next_logits)
    if unstacks_layers(cfg):
        cache = cache.replace(layers=unstack_cache(cache.layers))
    none = jnp.zeros(len(prompt.tokens), jnp.int32)
    return choose_next(
        logits, DecodeState(jnp.int32(0), none, none > 0, none, cache, key), sampling
    )


def decode_step(
    cfg: Model, blocks, params, last: Batch, state: DecodeState, sampling: SamplingParams
) -> DecodeState:
    """Generates one more token.

    Args:
      blocks: of `unstacked_blocks`.
      last: of `last_tokens`: the fields of the last token of each prompt.
    """
    logits, cache = decode_logits(cfg, blocks, params, last, state)
    return choose_next(logits, state.replace(cache=cache), sampling)


def decode_logits(
    cfg: Model, blocks, params, last: Batch, state: DecodeState
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads the last token of every row; takes the arguments of `decode_step`."""
    rope_positions = last.rope_positions
    if rope_positions is not None:
        rope_positions = continued_rope_positions(rope_positions, state.count)
    batch = last.replace(
        tokens=state.token[:, None],
        positions=last.positions + state.count,
        rope_positions=rope_positions,
        image_token_index=jnp.full_like(last.image_token_index, NO_IMAGE),
        block_ids=None if last.block_ids is None else jnp.zeros_like(last.block_ids),
    )
    return forward(cfg, blocks, params, batch, state.cache)


def choose_next(logits: Float[Array, "B V"], state: DecodeState, sampling: Sampling) -> DecodeState:
    """Chooses the next token of every row; a row ends if its logits are not finite."""
    token, key = sampling.draw(logits, state.key)
    token = jnp.where(state.ended, sampling.eos[0], token) if sampling.eos else token
    fails = ~jnp.isfinite(logits).all(axis=-1) & ~state.ended
    return state.replace(
        count=state.count + 1,
        token=token,
        ended=state.ended | fails | is_end(token, sampling),
        failed=jnp.where(fails, state.count + 1, state.failed),
        key=key,
    )


def first_failure(failed: Int[Array, "B"]) -> Int[Array, "2"]:
    """Returns (token, row) of the earliest failure, with token 0 if there is none.

    Every process gets the same.
    """
    row = jnp.argmin(jnp.where(failed > 0, failed, jnp.iinfo(failed.dtype).max))
    return jnp.stack([failed[row], row.astype(failed.dtype)])


def check_finite(failure: Int[Array, "2"] | Int[np.ndarray, "2"], params) -> None:
    """Raises NonFiniteLogits for a `first_failure`; under `jax.jit` it is not checked."""
    if isinstance(failure, jax.core.Tracer):
        return
    token, row = np.asarray(failure).tolist()
    if token:
        raise NonFiniteLogits(token, row, params_dtype(params))


def params_dtype(params) -> np.dtype:
    return params["decoder"]["embedding"]["table"].dtype


def unstacks_layers(cfg: Model) -> bool:
    """Returns whether blocks and cache are unstacked for decoding.

    On a CPU, XLA copies each block out of a stack before it reads it, and reading weights is what a
    token costs there. With longrope, a token may recompute the cache (`Decoder`), which is a branch
    that takes stacked weights.
    """
    return jax.default_backend() == "cpu" and not longrope.may_recompute(cfg.decoder.rope)


def unstacked_blocks(cfg: Model, params):
    """Returns the decoder blocks for `decode_step`, copied once for all tokens if unstacked."""
    blocks = params["decoder"]["blocks"]
    return unstack(blocks) if unstacks_layers(cfg) else blocks


def forward(
    cfg: Model, blocks, params, batch: Batch, cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Returns next-token logits and the cache.

    Unstacked blocks are stacked again and unrolled: XLA removes the pair, so no weight is copied.
    """
    is_unstacked = unstacks_layers(cfg)
    if is_unstacked:
        cfg = replace(cfg, decoder=replace(cfg.decoder, unroll=cfg.decoder.depth + len(blocks)))
        blocks, cache = stack(blocks), cache.replace(layers=stack_cache(cache.layers))
    params = {**params, "decoder": {**params["decoder"], "blocks": blocks}}
    logits, cache = VLM(cfg).apply({"params": params}, batch, cache, method=VLM.next_logits)
    return logits, cache.replace(layers=unstack_cache(cache.layers)) if is_unstacked else cache


def unstack(stacked) -> list:
    """Splits a tree of arrays (L, ...) into L trees, each array in a separate buffer."""
    length = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, layer=layer: x[layer], stacked) for layer in range(length)]


def stack(layers: list):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def unstack_cache(stacked) -> list:
    """Splits keys and values (L, B, K, T, H) into L layers, without the batch axis if B is 1.

    With a batch axis of size 1, XLA:CPU copies all keys and values four times for every token.
    """
    return jax.tree.map(lambda x: x[0] if len(x) == 1 else x, unstack(stacked))


def stack_cache(layers: list):
    """Inverse of `unstack_cache`."""
    return stack(jax.tree.map(lambda x: x if x.ndim == 4 else x[None], layers))


def is_end(token: Int[Array, "B"], sampling: Sampling) -> Bool[Array, "B"]:
    return jnp.isin(token, jnp.array(sampling.eos, jnp.int32))


def last_tokens(prompt: Batch) -> Batch:
    """Selects the last slot of every row, without the images, which are in the cache by then."""
    return map_token_fields(lambda x: x[:, -1:], without_images(prompt))


def generate(
    cfg: Model,
    params,
    prompt: Batch,
    new_tokens: int,
    sampling: SamplingParams,
    key: jax.Array | None = None,
) -> Int[Array, "B new"]:
    """Generates at most `new_tokens` tokens for each of the left-padded prompts; stops when every
    row has ended.

    Raises:
      NonFiniteLogits: the logits of a token are NaN or infinite.
      ConfigError: the prompts and the new tokens are longer than the model's table of positions.
    """
    tokens, failure = _generate(
        cfg, params, prompt, new_tokens, sampling, jax.random.key(0) if key is None else key
    )
    check_finite(failure, params)
    return tokens


@functools.partial(jax.jit, static_argnames=("cfg", "new_tokens", "sampling"))
def _generate(
    cfg: Model,
    params,
    prompt: Batch,
    new_tokens: int,
    sampling: SamplingParams,
    key: jax.Array,
):
    """Tokens (B, new), and the `first_failure`."""
    state = prefill(cfg, params, prompt, new_tokens, sampling, key)
    filler = sampling.eos[0] if sampling.eos else 0
    tokens = jnp.full((len(state.token), new_tokens), filler, jnp.int32).at[:, 0].set(state.token)
    last = last_tokens(prompt)
    # Without the barrier, XLA moves the unstacking into the loop: a copy for every token.
    blocks = jax.lax.optimization_barrier(unstacked_blocks(cfg, params))

    def unfinished(carry):
        state, _ = carry
        return (state.count < new_tokens) & ~state.ended.all()

    def next_token(carry):
        state, tokens = carry
        following = decode_step(cfg, blocks, params, last, state, sampling)
        return following, tokens.at[:, state.count].set(following.token)

    state, tokens = jax.lax.while_loop(unfinished, next_token, (state, tokens))
    return tokens, first_failure(state.failed)


_prefill = jax.jit(prefill, static_argnames=("cfg", "new_tokens", "sampling"))
_decoder_blocks = jax.jit(unstacked_blocks, static_argnames="cfg")
_advance = jax.jit(decode_step, static_argnames=("cfg", "sampling"), donate_argnames="state")


def stream(
    cfg: Model,
    params,
    prompt: Batch,
    new_tokens: int,
    sampling: SamplingParams,
    key: jax.Array | None = None,
) -> Iterator[Int[np.ndarray, "B"]]:
    """Yields the tokens of `generate` as soon as each is chosen; raises the same errors."""
    state = _prefill(
        cfg, params, prompt, new_tokens, sampling, jax.random.key(0) if key is None else key
    )
    last, blocks = last_tokens(prompt), _decoder_blocks(cfg, params)
    for number in range(1, new_tokens + 1):
        token, ended, failed = jax.device_get((state.token, state.ended, state.failed))
        if failed.any():
            check_finite(np.array([number, failed.argmax()]), params)
        yield token
        if ended.all() or number == new_tokens:
            return
        state = _advance(cfg, blocks, params, last, state, sampling)
