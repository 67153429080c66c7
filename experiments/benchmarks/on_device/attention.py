"""Every attention path against the plain formula, forward and backward, with all kinds of masks.

The reference is the formula in float32 at the highest precision, differentiated by JAX. A row's
error is the largest relative error, in the Frobenius norm, of the output and the gradients of
queries, keys and values. A fused kernel must also be about as exact as the plain path in its dtype.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.nn import attention, fusion, kernels
from vlm_jax.structs import (
    ANY_LAYOUT,
    NO_IMAGE,
    ONE_SEGMENT,
    PACKED,
    PADDING,
    TRUNK,
    Batch,
    Cache,
    SegmentPattern,
)

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
ODD = Shape(577, 577, 16, 16)
SEVERAL_IMAGES = Shape(keys=4 * 144)
WIDE_HEADS = Shape(head_dim=128, heads=8, kv_heads=2)
PREFILL = Shape(queries=512, keys=640)
DECODE = Shape(queries=1, keys=640)


class Pattern(NamedTuple):
    """The keys that each query attends to; None: all."""

    mask: jax.Array | None = None  # (#B, 1, #S, T)
    segments: SegmentPattern | None = None  # set if it is the same as `mask`


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
    segment_ids[shape.queries - size // 4 :] = PADDING
    branch_ids = np.where(second_half, 1 + inside * branches // size, TRUNK)
    ids = {
        "tokens": slots,
        "positions": inside,
        "segment_ids": segment_ids,
        "branch_ids": branch_ids if branches else None,
        "image_token_index": np.full_like(slots, NO_IMAGE),
        "block_ids": (~second_half).astype(np.int64) if blocks else None,
    }
    rows = {
        name: None if x is None else jnp.asarray(np.tile(x, (ROWS, 1)), jnp.int32)
        for name, x in ids.items()
    }
    layout = ONE_SEGMENT if segments == 1 else PACKED
    if branches or blocks:
        layout = ANY_LAYOUT
    return Batch(**rows, image_mask=jnp.zeros((ROWS, shape.queries, 0), bool), layout=layout)


def cached(shape: Shape, first_slot: int) -> Pattern:
    """Queries from `first_slot` on with a KV cache of all keys, and padding on the left."""
    slots = jnp.broadcast_to(jnp.arange(shape.keys), (ROWS, shape.keys))
    padding = jnp.arange(ROWS)[:, None] * (shape.keys // 8)  # row i has i eighths of padding
    keys = {
        "segment_ids": jnp.where(slots >= padding, 1, PADDING),
        "branch_ids": None,
        "positions": slots,
        "block_ids": None,
    }
    cache = Cache(index=jnp.int32(first_slot), layers=None, **keys)
    now = slice(first_slot, first_slot + shape.queries)
    queries = {name: None if x is None else x[:, now] for name, x in keys.items()}
    batch = Batch(tokens=slots[:, now], image_token_index=None, image_mask=None, **queries)
    return Pattern(fusion.self_attention_mask(batch, cache))


def images(shape: Shape, count: int) -> Pattern:
    """Cross-attention: segment i sees image i, and the tokens of padding none."""
    batch = text(shape, segments=count)
    image_mask = batch.segment_ids[..., None] == jnp.arange(1, count + 1)
    batch = batch.replace(image_mask=image_mask)
    return Pattern(fusion.cross_attention_mask(batch, shape.keys // count))


def padded_keys(shape: Shape) -> Pattern:
    """An encoder with padding: every query sees the same keys."""
    is_token = jnp.arange(shape.keys) < 3 * shape.keys // 4
    return Pattern(jnp.broadcast_to(is_token, (ROWS, 1, 1, shape.keys)))


def packed_images(shape: Shape, count: int) -> Pattern:
    """An encoder of images at native resolution, with padding at the end of a row."""
    ids = text(shape, segments=count).segment_ids
    mask = (ids[:, :, None] == ids[:, None])[:, None]
    return Pattern(mask, SegmentPattern(ids, causal=False))


def everything(shape: Shape) -> Pattern:
    return Pattern()


def sequence(window_divisor: int | None = None, **options) -> Callable[[Shape], Pattern]:
    """Returns a function: shape -> pattern of self-attention over the rows of `text`."""

    def build(shape: Shape) -> Pattern:
        batch = text(shape, **options)
        window = shape.queries // window_divisor if window_divisor else None
        mask = fusion.self_attention_mask(batch, window=window)
        return Pattern(mask, fusion.causal_pattern(batch, window=window))

    return build


def layer(has_window: bool) -> Callable[[Shape], Pattern]:
    """Returns a function as `sequence` does, for a model of layers with and without a window."""

    def build(shape: Shape) -> Pattern:
        mask = sequence(window_divisor=4 if has_window else None)(shape).mask
        segments = sequence(window_divisor=4)(shape).segments
        return Pattern(mask, segments.replace(has_window=jnp.bool_(has_window)))

    return build


# Name -> shape and function that builds the pattern.
CASES: dict[str, tuple[Shape, Callable[[Shape], Pattern]]] = {
    "causal": (SELF, sequence()),
    "packed rows": (SELF, sequence(segments=4)),
    "branches of a shared image": (SELF, sequence(branches=4)),
    "packed rows with branches": (SELF, sequence(segments=2, branches=2)),
    "prefix": (SELF, sequence(blocks=True)),
    "packed prefixes": (SELF, sequence(blocks=True, segments=4)),
    "causal, odd length": (ODD, sequence()),
    "branches, odd length": (ODD, sequence(branches=4)),
    "window": (SELF, sequence(window_divisor=4)),
    "window, of some layers": (SELF, layer(has_window=True)),
    "no window, unlike other layers": (SELF, layer(has_window=False)),
    "packed rows with a window": (SELF, sequence(window_divisor=8, segments=4)),
    "window and prefix": (SELF, sequence(window_divisor=8, blocks=True, segments=2)),
    "cross-attention, an image": (Shape(keys=576), everything),
    "cross-attention, an image of odd length": (Shape(keys=577), everything),
    "cross-attention, four images": (SEVERAL_IMAGES, functools.partial(images, count=4)),
    "prefill into a cache": (PREFILL, functools.partial(cached, first_slot=0)),
    "decode from a cache": (DECODE, lambda shape: cached(shape, shape.keys - 1)),
    "encoder": (Shape(576, 576, 16, 16), everything),
    "encoder, odd length": (ODD, everything),
    "encoder, packed images": (
        Shape(1024, 1024, 16, 16),
        functools.partial(packed_images, count=4),
    ),
    "encoder, padded tiles": (Shape(1024, 1024, 16, 16), padded_keys),
    "head dim 72": (Shape(256, 256, 16, 16, 72), everything),
    "head dim 128, causal": (WIDE_HEADS, sequence()),
    "head dim 128, packed rows": (WIDE_HEADS, sequence(segments=4)),
    "head dim 72, packed rows of odd length": (Shape(577, 577, head_dim=72), sequence(segments=4)),
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
        shape, build_pattern = CASES[name]
        shape = shape.tiny() if is_tiny else shape
        for dtype in DTYPES:
            rows[f"{name}, {dtype}"] = functools.partial(check, shape, build_pattern, dtype)
    return rows


def check(shape: Shape, build_pattern: Callable[[Shape], Pattern], dtype: str) -> dict:
    """Returns the path that the platform chooses, and its error."""
    pattern = build_pattern(shape)
    # Cases of one shape share the programs of the formula and of the plain path.
    mask_alone = Pattern(pattern.mask)
    q, k, v, dy = inputs(shape, pattern.mask)
    narrow = [x.astype(dtype) for x in (q, k, v, dy)]
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in narrow]
        exact = value_and_gradients(formula, shape.cap, *wide, mask_alone)
    kernel = kernels.kernel_for(*narrow[:2], shape.cap, pattern.mask, pattern.segments)
    if kernel is None:
        pattern = mask_alone
    error, limit = relative_error(chosen, shape, narrow, pattern, exact), LIMITS[dtype]
    values = {"path": "plain", "largest error": error}
    if kernel is not None:
        values["path"] = f"{kernel.attend.__name__}, {kernel.form}"
        plain_error = relative_error(plain, shape, narrow, mask_alone, exact)
        values["error of the plain path"] = plain_error
        limit = min(limit, KERNEL_FACTOR * plain_error + KERNEL_SLACK)
    return values | {"limit": limit, "passed": error <= limit}


def inputs(shape: Shape, mask: jax.Array | None) -> list[jax.Array]:
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


def formula(q, k, v, pattern, cap):
    """Attention in its plainest form, with keys and values repeated for the heads of a group."""
    groups = q.shape[2] // k.shape[1]
    k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    scores = jnp.einsum("bsnh,bnth->bnst", q, k) * q.shape[-1] ** -0.5
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    if pattern.mask is not None:
        scores = jnp.where(pattern.mask, scores, attention.MASK_VALUE)
    return jnp.einsum("bnst,bnth->bsnh", jax.nn.softmax(scores), v)


def chosen(q, k, v, pattern, cap):
    """The path that the platform chooses."""
    return attention.dot_product_attention(q, k, v, pattern.mask, cap=cap, pattern=pattern.segments)


def plain(q, k, v, pattern, cap):
    """The path without a fused kernel."""
    with plain_attention():
        return chosen(q, k, v, pattern, cap)


def plain_attention():
    """Context in which programs are traced without fused kernels."""
    return mock.patch.object(attention, "kernel_for", lambda *inputs: None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(function, cap, q, k, v, dy, pattern) -> tuple:
    """Returns the output, 0 where its gradient is, and the gradients of q, k and v."""

    def loss(q, k, v):
        y = function(q, k, v, pattern, cap)
        y = jnp.where((dy == 0).all((2, 3), keepdims=True), 0, y).astype(jnp.float32)
        return jnp.sum(y * dy), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return y, *gradients


def relative_error(
    function, shape: Shape, arrays: list[jax.Array], pattern: Pattern, exact
) -> float:
    """Returns the largest of the relative errors of the output and the gradients; NaN stays."""
    results = value_and_gradients(function, shape.cap, *arrays, pattern)
    errors = [
        np.linalg.norm(np.float32(x) - np.float32(reference)) / np.linalg.norm(reference)
        for x, reference in zip(results, exact)
    ]
    return float(np.max(errors))
