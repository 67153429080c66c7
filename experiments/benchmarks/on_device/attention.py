"""Every attention path against the plain formula, forward and backward, with all kinds of masks.

The reference is the formula in float32 at the highest precision, differentiated by JAX. A row's
error is the largest relative error, in the Frobenius norm, of the output and the gradients of
queries, keys and values. A fused kernel must also be about as exact as the plain path in its dtype.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.nn import attention, fusion, kernels
from vlm_jax.structs import NO_IMAGE, Batch, Cache

ROWS = 2
DTYPES = ("bfloat16", "float32")
# Largest relative error; products of float32 are of lower precision on accelerators.
LIMITS = {"bfloat16": 0.02, "float32": 0.01}
# Largest error of a kernel: a multiple of the plain path's error, and a constant.
KERNEL_FACTOR, KERNEL_SLACK = 1.5, 1e-3
# Lengths of tiny cases are these multiples smaller.
TINY_FACTOR = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a case; the cases of one shape share their compiled programs."""

    queries: int = 512
    keys: int = 512
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 64
    cap: float | None = None

    def tiny(self) -> "Shape":
        def shorten(length: int) -> int:
            return max(length // TINY_FACTOR + length % 2, 1)

        return Shape(shorten(self.queries), shorten(self.keys), 4, 2, self.head_dim // 2, self.cap)


SELF = Shape()
SEVERAL_IMAGES = Shape(keys=4 * 144)
PREFILL = Shape(queries=512, keys=640)
DECODE = Shape(queries=1, keys=640)
Mask = jax.Array | None


def text(shape: Shape, blocks: bool = False, segments: int = 1, branches: int = 0) -> Batch:
    """Returns rows of equal segments with padding at their ends.

    Args:
      blocks: the first half of each segment is a block of bidirectional attention.
      branches: number of branches in the second half of each segment.
    """
    size = shape.queries // segments
    slots = np.arange(shape.queries)
    inside = slots % size
    second_half = inside >= size // 2
    segment_ids = np.minimum(slots // size + 1, segments)
    segment_ids[shape.queries - size // 4 :] = 0
    branch_ids = np.zeros_like(slots)
    if branches:
        branch_ids = np.where(second_half, 1 + inside * branches // size, 0)
    ids = {
        "tokens": slots,
        "positions": inside,
        "segment_ids": segment_ids,
        "branch_ids": branch_ids,
        "image_token_index": np.full_like(slots, NO_IMAGE),
        "block_ids": (~second_half).astype(np.int64) if blocks else None,
    }
    rows = {
        name: None if x is None else jnp.asarray(np.tile(x, (ROWS, 1)), jnp.int32)
        for name, x in ids.items()
    }
    return Batch(**rows, image_mask=jnp.zeros((ROWS, shape.queries, 0), bool))


def cached(shape: Shape, first_slot: int) -> Mask:
    """Mask of queries from `first_slot` on over a KV cache of all keys, with left padding."""
    slots = jnp.broadcast_to(jnp.arange(shape.keys), (ROWS, shape.keys))
    padding = jnp.arange(ROWS)[:, None] * (shape.keys // 8)  # row i has i eighths of padding
    keys = {
        "segment_ids": jnp.where(slots >= padding, 1, 0),
        "branch_ids": jnp.zeros_like(slots),
        "positions": slots,
        "block_ids": None,
    }
    cache = Cache(index=jnp.int32(first_slot), layers=None, **keys)
    now = slice(first_slot, first_slot + shape.queries)
    queries = {name: None if x is None else x[:, now] for name, x in keys.items()}
    batch = Batch(tokens=slots[:, now], image_token_index=None, image_mask=None, **queries)
    return fusion.self_attention_mask(batch, cache)


def images(shape: Shape, count: int) -> Mask:
    """Mask of cross-attention: segment i sees image i, and the tokens of padding none."""
    batch = text(shape, segments=count)
    image_mask = batch.segment_ids[..., None] == jnp.arange(1, count + 1)
    return fusion.cross_attention_mask(batch.replace(image_mask=image_mask), shape.keys // count)


def padded_keys(shape: Shape) -> Mask:
    """Mask of an encoder with padding: every query sees the same keys."""
    return jnp.broadcast_to(jnp.arange(shape.keys) < 3 * shape.keys // 4, (ROWS, 1, 1, shape.keys))


def sequence(window_divisor: int | None = None, **options) -> Callable[[Shape], Mask]:
    """Returns a function: shape -> mask of self-attention over the rows of `text`."""

    def build(shape: Shape) -> Mask:
        window = shape.queries // window_divisor if window_divisor else None
        return fusion.self_attention_mask(text(shape, **options), window=window)

    return build


# Name -> shape and function that builds the mask.
CASES: dict[str, tuple[Shape, Callable[[Shape], Mask]]] = {
    "causal": (SELF, sequence()),
    "packed rows": (SELF, sequence(segments=4)),
    "branches of a shared image": (SELF, sequence(branches=4)),
    "packed rows with branches": (SELF, sequence(segments=2, branches=2)),
    "prefix": (SELF, sequence(blocks=True)),
    "packed prefixes": (SELF, sequence(blocks=True, segments=4)),
    "window": (SELF, sequence(window_divisor=4)),
    "window and prefix": (SELF, sequence(window_divisor=8, blocks=True, segments=2)),
    "cross-attention, an image": (SEVERAL_IMAGES, functools.partial(images, count=1)),
    "cross-attention, four images": (SEVERAL_IMAGES, functools.partial(images, count=4)),
    "prefill into a cache": (PREFILL, functools.partial(cached, first_slot=0)),
    "decode from a cache": (DECODE, lambda shape: cached(shape, shape.keys - 1)),
    "encoder": (Shape(576, 576, 16, 16), lambda shape: None),
    "encoder, odd length": (Shape(577, 577, 16, 16), lambda shape: None),
    "encoder, padded tiles": (Shape(1024, 1024, 16, 16), padded_keys),
    "head dim 72": (Shape(256, 256, 16, 16, 72), lambda shape: None),
    "head dim 128, causal": (Shape(head_dim=128, heads=8, kv_heads=2), sequence()),
    "head dim 256, one key head": (Shape(head_dim=256, heads=8, kv_heads=1), sequence()),
    "capped scores": (Shape(cap=30.0), sequence()),
}
# The rest of the cases compile further programs.
TINY_CASES = (
    "packed rows with branches",
    "window and prefix",
    "cross-attention, four images",
    "decode from a cache",
    "encoder, odd length",
)


def tasks(is_tiny: bool) -> dict[str, Callable[[], dict]]:
    rows = {}
    for name in TINY_CASES if is_tiny else CASES:
        shape, build_mask = CASES[name]
        shape = shape.tiny() if is_tiny else shape
        for dtype in DTYPES:
            rows[f"{name}, {dtype}"] = functools.partial(check, shape, build_mask, dtype)
    return rows


def check(shape: Shape, build_mask: Callable[[Shape], Mask], dtype: str) -> dict:
    """Returns the path that the platform chooses, and its error."""
    mask = build_mask(shape)
    q, k, v, dy = inputs(shape, mask)
    narrow = [x.astype(dtype) for x in (q, k, v, dy)]
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in narrow]
        exact = value_and_gradients(formula, shape.cap, *wide, mask)
    kernel = kernels.kernel_for(narrow[0], narrow[1], shape.cap)
    error, limit = relative_error(chosen, shape, narrow, mask, exact), LIMITS[dtype]
    values = {"path": "plain" if kernel is None else kernel.__name__, "largest error": error}
    if kernel is not None:
        plain_error = relative_error(plain, shape, narrow, mask, exact)
        values["error of the plain path"] = plain_error
        limit = min(limit, KERNEL_FACTOR * plain_error + KERNEL_SLACK)
    return values | {"limit": limit, "passed": error <= limit}


def inputs(shape: Shape, mask: Mask) -> list[jax.Array]:
    """Random queries, keys, values and gradient of the output, in float32.

    Paths differ for a query that sees no key, and the model does not use it: its gradient is 0.
    """
    rng = np.random.default_rng(0)
    q, dy = rng.normal(size=(2, ROWS, shape.queries, shape.heads, shape.head_dim))
    k, v = rng.normal(size=(2, ROWS, shape.kv_heads, shape.keys, shape.head_dim))
    if mask is not None:
        sees_a_key = np.asarray(mask).any(-1).swapaxes(1, 2)[..., None]  # (B, #S, 1, 1)
        dy *= sees_a_key
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, dy)]


def formula(q, k, v, mask, cap):
    """Attention in its plainest form, with keys and values repeated for the heads of a group."""
    groups = q.shape[2] // k.shape[1]
    k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    scores = jnp.einsum("bsnh,bnth->bnst", q, k) * q.shape[-1] ** -0.5
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    scores = scores if mask is None else jnp.where(mask, scores, attention.MASK_VALUE)
    return jnp.einsum("bnst,bnth->bsnh", jax.nn.softmax(scores), v)


def chosen(q, k, v, mask, cap):
    """The path that the platform chooses."""
    return attention.dot_product_attention(q, k, v, mask, cap=cap)


def plain(q, k, v, mask, cap):
    """The path without a fused kernel."""
    with plain_attention():
        return attention.dot_product_attention(q, k, v, mask, cap=cap)


def plain_attention():
    """Context in which programs are traced without fused kernels."""
    return mock.patch.object(attention, "kernel_for", lambda *inputs: None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(function, cap, q, k, v, dy, mask) -> tuple:
    """Returns the output, 0 where its gradient is, and the gradients of q, k and v."""

    def loss(q, k, v):
        y = function(q, k, v, mask, cap)
        y = jnp.where((dy == 0).all((2, 3), keepdims=True), 0, y).astype(jnp.float32)
        return jnp.sum(y * dy), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return y, *gradients


def relative_error(function, shape: Shape, arrays: list[jax.Array], mask: Mask, exact) -> float:
    """Returns the largest of the relative errors of the output and the gradients; NaN stays."""
    results = value_and_gradients(function, shape.cap, *arrays, mask)
    errors = [
        np.linalg.norm(np.float32(x) - np.float32(reference)) / np.linalg.norm(reference)
        for x, reference in zip(results, exact)
    ]
    return float(np.max(errors))
