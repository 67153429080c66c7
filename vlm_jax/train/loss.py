"""Masked cross-entropy as a sum and a count, which are divided once after every reduction.

Computed in chunks of tokens, so that the full logits (B, S, V) are never materialized.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from vlm_jax import axes
from vlm_jax.nn.quantized import Quantized
from vlm_jax.structs import Batch

# Logits that a device holds at once, if `train.loss_chunk` is not set.
CHUNK_BYTES = 64 * 2**20
# Tokens of each of several chunks: enough for a matmul's best rate, with few empty slots.
CHUNK_TOKENS = 512
Params = dict[tuple[str, ...], jax.Array | Quantized]


class Nats(NamedTuple):
    """Sum of -log p(target) over scored tokens, in nats."""

    total: Float[Array, ""]
    #: the same for the tokens of each source of a mixture, not differentiated; None: no mixture
    by_source: Float[Array, "N"] | None = None


@dataclass(frozen=True, eq=False)
class Head:
    """The output head as a function of its parameters: (B, S, D) -> logits (B, S, V).

    Its loss is differentiated apart from the model (`head_cross_entropy`).
    """

    apply: Callable[[Params, jax.Array], jax.Array]
    letters: dict[tuple[str, ...], str]  # logical axes of its parameters, by path
    vocab_size: int

    def select(self, params: Params) -> Params:
        """Selects the head's parameters."""
        return {path: x for path, x in params.items() if path in self.letters}

    def logits(self, params: Params, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Returns float32 logits for parameters and hidden states of any dtype."""
        wide = {path: value.astype(jnp.float32) for path, value in params.items()}
        return self.apply(wide, x.astype(jnp.float32))


def cross_entropy(
    logits: Float[Array, "B S V"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum of -log p(target) over the scored tokens, in nats, and their number.

    Computed in float32.
    """
    return _nats(logits, batch.targets, batch.loss_weights).total, jnp.sum(batch.loss_weights)


def _nats(logits, targets, weights, source_ids=None, num_sources: int = 0) -> Nats:
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = (jax.nn.logsumexp(logits, axis=-1) - target_logits) * weights
    if source_ids is None:
        return Nats(jnp.sum(nats))
    return Nats(jnp.sum(nats), sum_by_source(nats, source_ids, num_sources))


def sum_by_source(
    values: Array, source_ids: Int[Array, "..."], num_sources: int
) -> Shaped[Array, "N"]:
    """Returns the sum of the values of each source, without their gradient.

    Not a scatter, which sums in another order in every run on a GPU.
    """
    is_source = source_ids[..., None] == jnp.arange(num_sources)  # (..., N)
    values = jnp.where(is_source, jax.lax.stop_gradient(values)[..., None], 0)
    return jnp.sum(values, axis=tuple(range(values.ndim - 1)))


def head_cross_entropy(
    head: Head,
    trained: Params,
    frozen: Params,
    hidden: Float[Array, "B S D"],
    batch: Batch,
    chunk: int | None = None,
    num_sources: int = 0,
) -> Nats:
    """Returns the sum of `cross_entropy`, with logits of at most `chunk` tokens a device at a time.

    The scored tokens of each device's rows are packed to the front, and a loop runs over chunks up
    to the last scored token of the fullest device, so that its cost grows with their number. The
    gradients of a chunk are computed together with its logits, so that the backward pass needs no
    logits. A single chunk needs no loop.

    Args:
      trained: parameters of the head that get a gradient.
      frozen: the others.
      hidden: final hidden states.
      chunk: scored tokens of a device; None: see `chunk_tokens`.
      num_sources: N, of the mixture that `batch.source_ids` counts.
    """
    shards = axes.row_shards()
    tokens = batch.targets.size // shards
    chunk = chunk_tokens(tokens, head.vocab_size, chunk)
    if tokens <= chunk:
        logits = axes.constrain(head.logits({**trained, **frozen}, hidden), "B S V")
        return _nats(logits, batch.targets, batch.loss_weights, batch.source_ids, num_sources)

    # Scored tokens first. Slots that fill the last chunk are out of bounds, and read as 0.
    is_unscored = batch.loss_weights.reshape(shards, tokens) == 0
    order = jnp.argsort(is_unscored, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -tokens % chunk)), constant_values=tokens)
    per_token = (hidden, batch.targets, batch.loss_weights, batch.source_ids)
    packed = [None if x is None else _pack(x, order) for x in per_token]
    scored_in_fullest = jnp.max(jnp.sum(~is_unscored, axis=1))
    chunks = (scored_in_fullest + chunk - 1) // chunk

    return _chunked(head, chunk, num_sources, trained, frozen, *packed, chunks)


def _gather(head: Head, params: Params) -> Params:
    """Gathers the head's parameters, once for all chunks."""
    return {path: axes.constrain(x, head.letters[path]) for path, x in params.items()}


def chunk_tokens(tokens: int, vocab_size: int, chunk: int | None = None) -> int:
    """Returns the chunk size in tokens of a device.

    `chunk` if it is set; else all `tokens`, if their logits fit in CHUNK_BYTES.
    """
    if chunk is not None:
        return chunk
    fitting = max(1, CHUNK_BYTES // (4 * vocab_size))
    return tokens if tokens <= fitting else min(fitting, CHUNK_TOKENS)


def _pack(x, order):
    """(B, S, ...) -> (shards, slots, ...): each device's tokens in their order."""
    shards, trailing = len(order), x.shape[2:]
    x = axes.constrain_rows(x.reshape(shards, -1, *trailing))
    index = order.reshape(*order.shape, *(1 for _ in trailing))
    return axes.constrain_rows(jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0))


def _shard_nats(head, num_sources, trained, frozen, x, targets, weights, source_ids):
    """Loss of one shard's chunk: (chunk, D), and (chunk,) of the others -> (), (N,) or None."""
    logits = head.logits({**trained, **frozen}, x[None])[0]
    return tuple(_nats(logits, targets, weights, source_ids, num_sources))


def _zero_nats(shards, num_sources, source_ids):
    """Sums of each shard before the first chunk."""
    by_source = None
    if source_ids is not None:
        by_source = axes.constrain_rows(jnp.zeros((shards, num_sources)))
    return axes.constrain_rows(jnp.zeros(shards)), by_source


def _sum_shards(sums) -> Nats:
    return Nats(*jax.tree.map(lambda x: jnp.sum(x, axis=0), sums))


def _piece(arrays, i, chunk):
    def cut(x):
        return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)

    return jax.tree.map(cut, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    head, chunk, num_sources, trained, frozen, x, targets, weights, source_ids, chunks
) -> Nats:
    trained, frozen = _gather(head, trained), _gather(head, frozen)
    shard_nats = functools.partial(_shard_nats, head, num_sources)
    shard_nats = jax.vmap(shard_nats, in_axes=(None, None, 0, 0, 0, 0))

    def body(i, sums):
        pieces = _piece((x, targets, weights, source_ids), i, chunk)
        return jax.tree.map(jnp.add, sums, shard_nats(trained, frozen, *pieces))

    start = _zero_nats(len(x), num_sources, source_ids)
    return _sum_shards(jax.lax.fori_loop(0, chunks, body, start))


def _chunked_forward(
    head, chunk, num_sources, trained, frozen, x, targets, weights, source_ids, chunks
):
    """Returns the loss and its gradients.

    Every shard sums its own gradient of the head; they are reduced once, after the loop.
    """
    trained, frozen = _gather(head, trained), _gather(head, frozen)
    shard_nats = functools.partial(_shard_nats, head, num_sources)
    gradient = jax.value_and_grad(shard_nats, argnums=(0, 2), has_aux=True)
    gradient = jax.vmap(gradient, in_axes=(None, None, 0, 0, 0, 0))
    zeros = {
        path: axes.constrain(jnp.zeros((len(x), *w.shape)), f"B {head.letters[path]}")
        for path, w in trained.items()
    }

    def body(i, sums):
        nats, d_trained, dx = sums
        pieces = _piece((x, targets, weights, source_ids), i, chunk)
        new_nats, (d_head, d_piece) = gradient(trained, frozen, *pieces)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, d_piece, i * chunk, axis=1)
        add = functools.partial(jax.tree.map, jnp.add)
        return add(nats, new_nats), add(d_trained, d_head), dx

    start = (_zero_nats(len(x), num_sources, source_ids), zeros, jnp.zeros_like(x))
    nats, d_trained, dx = jax.lax.fori_loop(0, chunks, body, start)
    d_trained = {path: axes.sum_rows(d, head.letters[path]) for path, d in d_trained.items()}
    return _sum_shards(nats), (d_trained, dx)


def _chunked_backward(head, chunk, num_sources, saved, d_nats):
    d_trained, dx = saved
    dy = d_nats.total
    d_trained = {path: dy * d for path, d in d_trained.items()}
    return d_trained, None, (dy * dx).astype(dx.dtype), None, None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
