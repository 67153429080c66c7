"""Forward passes that keep attention weights, and what rollout and gradients make of them.

The decoder's weights are a tree by block of the repeating pattern and sublayer, such as
{"block_0": {"self": {"weights": (L, B, N, S, T)}}}; block i of step l is block l * period + i.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.config import Model
from vlm_jax.nn.attention import PERTURBATIONS, WEIGHT, WEIGHTS
from vlm_jax.nn.blocks import BLOCK, LAYERS, repeating_period
from vlm_jax.nn.fusion import mask_tokens_without_image, without_thumbnails
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import Batch

LEAST_SHARE = 1e-30
ATTENTIONS = ("self", "cross")  # names of the sublayers with attention


class Observed(NamedTuple):
    """Attention of the queries `slots` (B, A), one array for each kind of attention or none."""

    self: jax.Array | None  # (L, B, N, A, S)
    cross: jax.Array | None  # (L, B, N, A, T)
    #: (B, A, S + T): tokens of the sequence, then image tokens in cross-attention
    rollout: jax.Array | None
    #: (I, Q, P): image by image, the patches that a learned query attends to, sum 1; at native
    #: resolution (B, I * Q, P), row by row
    resampler: jax.Array | None


@functools.partial(jax.jit, static_argnames=("cfg", "has_rollout"))
def observe(
    cfg: Model, params, batch: Batch, slots: jax.Array, has_rollout: bool = False
) -> Observed:
    """Runs one forward pass, and returns the attention weights of some queries of each row.

    Args:
      slots: (B, A) indices of the queries.
      has_rollout: also computes attention rollout (Abnar and Zuidema 2020, section 3).
    """
    _, variables = VLM(cfg).apply({"params": params}, batch, mutable=[WEIGHTS], method=VLM.hidden)
    tree = _without_absent_images(cfg, batch, _decoder_tree(variables[WEIGHTS]))
    arrays = {}
    for name in ATTENTIONS:
        stacked = _in_depth_order(tree, name)
        arrays[name] = None if stacked is None else _take(stacked, slots[None, :, None])
    rollout = None
    if has_rollout:
        mean = jax.tree.map(lambda weights: weights.mean(2), tree)
        rollout = _take(_accumulate(cfg, mean, _mix), slots)
    return Observed(arrays["self"], arrays["cross"], rollout, _resampler_weights(cfg, variables))


@functools.partial(jax.jit, static_argnames="cfg")
def gradient_relevance(
    cfg: Model, params, batch: Batch, slots: jax.Array, targets: jax.Array
) -> jax.Array:
    """Relevance of every token for one logit of each row (Chefer et al. 2021, eq. 5 and 6).

    The weights of a layer are the mean over its heads of the positive part of gradient * weight.
    Relevance adds up along the layers; images in cross-attention are sources like the sequence.

    Args:
      slots: (B,) the slot of each logit.
      targets: (B,) the token of each logit.

    Returns:
      (B, S + T): tokens of the sequence, then image tokens in cross-attention.
    """
    rows = jnp.arange(len(slots))

    def total_logit(perturbations):
        variables = {"params": params, PERTURBATIONS: {"decoder": perturbations}}
        (hidden, _), state = VLM(cfg).apply(variables, batch, mutable=[WEIGHTS], method=VLM.hidden)
        query = hidden[rows, slots][:, None]
        logits = VLM(cfg).apply({"params": params}, query, method=VLM.head)[:, 0]
        # The rows do not depend on each other, so the gradient of the sum has that of each.
        return logits[rows, targets].astype(jnp.float32).sum(), state[WEIGHTS]["decoder"]

    shapes = jax.eval_shape(lambda: total_logit({})[1])
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    gradients, weights = jax.grad(total_logit, has_aux=True)(zeros)
    relevance = jax.tree.map(lambda g, w: jax.nn.relu(g * w).mean(2), gradients, weights)
    tree = _without_absent_images(cfg, batch, _decoder_tree({"decoder": relevance}))
    return _accumulate(cfg, tree, jnp.add)[rows, slots]


def _decoder_tree(weights) -> dict[str, dict[str, jax.Array]]:
    """Returns block -> sublayer -> weights (L, B, ...)."""
    tree = {}
    for block, sublayers in weights["decoder"]["blocks"][LAYERS].items():
        tree[block] = {name: sublayer[WEIGHT] for name, sublayer in sublayers.items()}
    return tree


def _without_absent_images(cfg: Model, batch: Batch, tree):
    """Zeroes cross-attention of tokens that skip it: their weights have no effect."""
    mask = batch.image_mask
    if cfg.fusion.splits_views:
        mask = without_thumbnails(cfg, mask, axis=2)
    batch = batch.replace(image_mask=mask)
    if cfg.fusion.tokens_without_image == "attend_all":
        batch = batch.replace(image_mask=mask_tokens_without_image(batch))
    attends = batch.image_mask.any(-1)  # (B, S)

    def zero(path, weights):
        if path[-1].key != "cross":
            return weights
        heads = (None,) * (weights.ndim - 4)
        return weights * attends[(None, slice(None), *heads, slice(None), None)]

    return jax.tree_util.tree_map_with_path(zero, tree)


def _in_depth_order(tree, name: str) -> jax.Array | None:
    """Weights of all sublayers of a name, (L, ...), from the first block to the last."""
    stacked = [tree[block][name] for block in _ordered(tree) if name in tree[block]]
    if not stacked:
        return None
    by_step = jnp.stack(stacked, axis=1)
    return by_step.reshape(-1, *by_step.shape[2:])


def _ordered(tree) -> list[str]:
    """Names of the pattern's blocks in order; block_10 comes after block_2."""
    return sorted(tree, key=lambda block: int(block.removeprefix(BLOCK)))


def _take(weights: jax.Array, slots: jax.Array) -> jax.Array:
    """Queries `slots` of weights (..., S, T); the axes before S broadcast with those of `slots`."""
    return jnp.take_along_axis(weights, slots[..., None], axis=-2)


def _mix(sources: jax.Array, attended: jax.Array) -> jax.Array:
    """The residual connection counts as much as the attention (Abnar and Zuidema 2020)."""
    return (sources + attended) / 2


def _accumulate(cfg: Model, tree, combine: Callable[[jax.Array, jax.Array], jax.Array]):
    """Shares of the decoder's inputs in the hidden state of every token after the last layer.

    Args:
      tree: weights, combined over the heads: (L, B, S, T).
      combine: (shares before a layer, shares that its attention adds) -> shares after it.

    Returns:
      (B, S, S + T): tokens of the sequence, then image tokens in cross-attention.
    """
    period = repeating_period(cfg.fusion.sublayers(cfg.decoder.depth))
    first = jax.tree.leaves(tree)[0]
    rows, length = first.shape[1:3]
    crosses = [names["cross"] for names in tree.values() if "cross" in names]
    image_tokens = crosses[0].shape[-1] if crosses else 0
    shape = (rows, length, length + image_tokens)
    shares = jnp.broadcast_to(jnp.eye(*shape[1:]), shape)

    def step(shares, weights):
        for i, sublayers in enumerate(period):
            for name in sublayers:
                if name not in weights.get(f"{BLOCK}{i}", {}):
                    continue
                attended = weights[f"{BLOCK}{i}"][name]
                if name == "self":
                    attended = attended @ shares
                else:
                    attended = jnp.pad(attended, ((0, 0), (0, 0), (length, 0)))
                shares = combine(shares, attended)
        return shares, None

    return jax.lax.scan(step, shares, tree)[0]


def _resampler_weights(cfg: Model, variables: dict[str, Any]) -> jax.Array | None:
    """Rollout through a projector with learned queries, on the patches alone and normalized."""
    if cfg.projector.spec.tokens != "queries":
        return None
    blocks = [
        {name: sublayer[WEIGHT].mean(1) for name, sublayer in block.items()}
        for block in _in_order(variables[WEIGHTS]["projector"])
    ]
    # A query starts without a share of any patch.
    shares = jnp.zeros(_patch_weights(blocks[0])[0].shape)
    for block in blocks:
        if "self" in block:
            shares = _mix(shares, block["self"] @ shares)
        if len(block) > ("self" in block):
            patches, queries = _patch_weights(block)
            attended = patches if queries is None else patches + queries @ shares
            shares = _mix(shares, attended)
    shares = shares[..., cfg.vision.extra_tokens :]
    # The queries of an image slot without an image have no share.
    return shares / jnp.maximum(shares.sum(-1, keepdims=True), LEAST_SHARE)


def _in_order(tree) -> list:
    return [tree[block] for block in _ordered(tree)]


def _patch_weights(block: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """Weights of the patches (I, Q, P) in a block, and of the queries if they are keys, too.

    They are not if the block also has self-attention.
    """
    (weights,) = [weights for name, weights in block.items() if name != "self"]
    if "self" in block:
        return weights, None
    return tuple(jnp.split(weights, [weights.shape[2] - weights.shape[1]], axis=-1))
