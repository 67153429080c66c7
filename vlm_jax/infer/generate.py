"""Cached generation: one prefill over the prompts, then single tokens with static shapes.

`generate` runs the whole loop on the device, `stream` hands every token over as soon as it is made.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.config import Model, NonFiniteError
from vlm_jax.nn import longrope
from vlm_jax.nn.vlm import VLM, empty_cache
from vlm_jax.structs import NO_IMAGE, Batch, Cache


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and which tokens end a text."""

    eos: tuple[
        int, ...
    ] = ()  # ids that end a text; after one of them only the first of them follows
    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that together have this probability (Holtzman et al. 2020)


@struct.dataclass
class DecodeState:
    """What changes from token to token."""

    count: jax.Array  # () int32: tokens made
    token: jax.Array  # (B,) int32: the last of them
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
        place = prompt or f"row {row + 1}"
        reason = "the weights are damaged"
        if dtype != np.float32:
            reason += f", or hidden states overflow {dtype}: load the parameters in float32"
        super().__init__(f"the logits of token {token} of {place} are NaN or infinite: {reason}.")
        self.token, self.row, self.dtype = token, row, dtype

    def about(self, prompt: str) -> "NonFiniteLogits":
        """The same failure, with the prompt named instead of the row."""
        return NonFiniteLogits(self.token, self.row, self.dtype, repr(prompt))


def choose(logits: Float[Array, "B V"], key: jax.Array, how: SamplingParams) -> Int[Array, "B"]:
    """One token a row."""
    if not how.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / how.temperature
    if how.top_k:
        least = jax.lax.top_k(logits, min(how.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.top_p < 1:
        descending = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(
            descending, axis=-1
        )
        least = jnp.min(jnp.where(before < how.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def begin(
    cfg: Model, params, prompt: Batch, new_tokens: int, how: SamplingParams, key: jax.Array
) -> DecodeState:
    """Reads the left-padded prompts and makes the first token of each."""
    cache = empty_cache(cfg, prompt, new_tokens, dtype_of(params))
    logits, cache = VLM(cfg).apply({"params": params}, prompt, cache, method=VLM.next_logits)
    if unstacks_layers(cfg):
        cache = cache.replace(layers=lay_out(cache.layers))
    none = jnp.zeros(len(prompt.tokens), jnp.int32)
    return following(logits, DecodeState(jnp.int32(0), none, none > 0, none, cache, key), how)


def decode_step(
    cfg: Model, blocks, params, last: Batch, progress: DecodeState, how: SamplingParams
) -> DecodeState:
    """One more token; `blocks` of `unstacked_blocks`, `last` is what the batch says of the prompts' last tokens."""
    batch = last.replace(
        tokens=progress.token[:, None],
        positions=last.positions + progress.count,
        image_token_index=jnp.full_like(last.image_token_index, NO_IMAGE),
        block_ids=None if last.block_ids is None else jnp.zeros_like(last.block_ids),
    )
    logits, cache = read(cfg, blocks, params, batch, progress.cache)
    return following(logits, progress.replace(cache=cache), how)


def following(
    logits: Float[Array, "B V"], progress: DecodeState, how: SamplingParams
) -> DecodeState:
    """Chooses the next token of every row. Logits that are not finite end their row."""
    key, now = jax.random.split(progress.key)
    token = choose(logits, now, how)
    token = jnp.where(progress.ended, how.eos[0], token) if how.eos else token
    fails = ~jnp.isfinite(logits).all(axis=-1) & ~progress.ended
    return progress.replace(
        count=progress.count + 1,
        token=token,
        ended=progress.ended | fails | is_end(token, how),
        failed=jnp.where(fails, progress.count + 1, progress.failed),
        key=key,
    )


def first_failure(failed: Int[Array, "B"]) -> Int[Array, "2"]:
    """(token, row) of the earliest failure; token 0: there is none. Every process has it."""
    row = jnp.argmin(jnp.where(failed > 0, failed, jnp.iinfo(failed.dtype).max))
    return jnp.stack([failed[row], row.astype(failed.dtype)])


def check_finite(failure: Int[Array, "2"] | Int[np.ndarray, "2"], params) -> None:
    """Raises NonFiniteLogits for a `first_failure`; a traced one, of a call within `jax.jit`, is not checked."""
    if isinstance(failure, jax.core.Tracer):
        return
    token, row = np.asarray(failure).tolist()
    if token:
        raise NonFiniteLogits(token, row, dtype_of(params))


def dtype_of(params) -> np.dtype:
    return params["decoder"]["embedding"]["table"].dtype


def unstacks_layers(cfg: Model) -> bool:
    """Whether the blocks are laid out for decoding. A loop over stacked blocks copies each before it is read.

    XLA on the CPU does so, and reading weights is what a token costs there. With longrope, a token may read all again
    (`Decoder`), which is a branch that takes its weights stacked.
    """
    return jax.default_backend() == "cpu" and not longrope.may_recompute(cfg.decoder.rope)


def unstacked_blocks(cfg: Model, params):
    """The decoder's blocks as `decode_step` wants them; where they are laid out it is a copy, made once for all tokens."""
    blocks = params["decoder"]["blocks"]
    return lay_out(blocks) if unstacks_layers(cfg) else blocks


def read(
    cfg: Model, blocks, params, batch: Batch, cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """`VLM.next_logits`; nothing is copied where blocks and cache are laid out: XLA takes the stacks apart again."""
    apart = unstacks_layers(cfg)
    if apart:
        cfg = replace(cfg, decoder=replace(cfg.decoder, unroll=cfg.decoder.depth + len(blocks)))
        blocks, cache = stack(blocks), cache.replace(layers=stack(cache.layers))
    params = {**params, "decoder": {**params["decoder"], "blocks": blocks}}
    logits, cache = VLM(cfg).apply({"params": params}, batch, cache, method=VLM.next_logits)
    return logits, cache.replace(layers=lay_out(cache.layers)) if apart else cache


def lay_out(stacked) -> list:
    """A tree of arrays that are stacked over L -> L trees, every array in a buffer of its own."""
    turns = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, turn=turn: x[turn], stacked) for turn in range(turns)]


def stack(layers: list):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def is_end(token: Int[Array, "B"], how: SamplingParams) -> Bool[Array, "B"]:
    return jnp.isin(token, jnp.array(how.eos, jnp.int32))


def last_tokens(prompt: Batch) -> Batch:
    """The last slot of every row, without the images that are in the cache by then."""
    without_images = prompt.replace(images=None, image_rows=None, tile_layouts=None, tile_mask=None)
    return jax.tree.map(lambda x: x[:, -1:], without_images)


def generate(
    cfg: Model,
    params,
    prompt: Batch,
    new_tokens: int,
    how: SamplingParams,
    key: jax.Array | None = None,
) -> Int[Array, "B new"]:
    """Generates at most `new_tokens` tokens for each of the left-padded prompts; stops when every row has ended.

    Raises:
      NonFiniteLogits: the logits of a token are NaN or infinite.
      ConfigError: the prompts and the new tokens are longer than the model's table of positions.
    """
    made, failure = _generate(
        cfg, params, prompt, new_tokens, how, jax.random.key(0) if key is None else key
    )
    check_finite(failure, params)
    return made


@functools.partial(jax.jit, static_argnames=("cfg", "new_tokens", "how"))
def _generate(
    cfg: Model, params, prompt: Batch, new_tokens: int, how: SamplingParams, key: jax.Array
):
    """Tokens (B, new), and the `first_failure`."""
    progress = begin(cfg, params, prompt, new_tokens, how, key)
    filler = how.eos[0] if how.eos else 0
    made = (
        jnp.full((len(progress.token), new_tokens), filler, jnp.int32).at[:, 0].set(progress.token)
    )
    last, blocks = last_tokens(prompt), jax.lax.optimization_barrier(unstacked_blocks(cfg, params))

    def unfinished(carry):
        return (carry[0].count < new_tokens) & ~carry[0].ended.all()

    def one_more(carry):
        following = decode_step(cfg, blocks, params, last, carry[0], how)
        return following, carry[1].at[:, carry[0].count].set(following.token)

    progress, made = jax.lax.while_loop(unfinished, one_more, (progress, made))
    return made, first_failure(progress.failed)


_begin = jax.jit(begin, static_argnames=("cfg", "new_tokens", "how"))
_decoder_blocks = jax.jit(unstacked_blocks, static_argnames="cfg")
_advance = jax.jit(decode_step, static_argnames=("cfg", "how"), donate_argnames="progress")


def stream(
    cfg: Model,
    params,
    prompt: Batch,
    new_tokens: int,
    how: SamplingParams,
    key: jax.Array | None = None,
) -> Iterator[Int[np.ndarray, "B"]]:
    """Yields the tokens of `generate`, each as soon as it is made. Raises what `generate` raises."""
    progress = _begin(
        cfg, params, prompt, new_tokens, how, jax.random.key(0) if key is None else key
    )
    last, blocks = last_tokens(prompt), _decoder_blocks(cfg, params)
    for number in range(1, new_tokens + 1):
        token, ended, failed = jax.device_get((progress.token, progress.ended, progress.failed))
        if failed.any():
            check_finite(np.array([number, failed.argmax()]), params)
        yield token
        if ended.all() or number == new_tokens:
            return
        progress = _advance(cfg, blocks, params, last, progress, how)
