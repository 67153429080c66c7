"""Fused attention kernels, which never materialize the scores, and when to use them.

    platform  pattern                                 kernel            memory beside q, k, v
    gpu       all keys, one causal segment (window)   cudnn_attention   none
    gpu       packed segments, causal or not          pallas_attention  segment ids
    gpu       packed segments with a window, any      cudnn_attention   mask
    tpu       all keys, causal (segments, window)     splash_attention  segment ids
    tpu       any other                               splash_attention  mask

cuDNN runs through `jax.nn.dot_product_attention`. Its layout for packed rows needs a bound on the
segments of a row, statistics for each of them, a Hopper GPU, and as many key heads as query heads
(JAX 0.10.2). Packed rows therefore have JAX's Pallas kernel of FlashAttention (Dao et al. 2022),
which takes segment ids. Splash attention is a Pallas kernel of FlashAttention for TPUs that skips
the blocks the mask leaves empty; it takes a mask for all rows of a batch, so with a mask per row
the rows are processed one after another; one row fills a TPU core.

Tokamax has the same kernels, but no masks that differ between rows, and cannot be installed beside
tyro (0.0.12 pins typeguard 2).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import einops
import jax
import jax.numpy as jnp

from vlm_jax import axes
from vlm_jax.structs import SegmentPattern

# Name under which `remat` "attention" saves attention's inputs and output (`jax.ad_checkpoint`).
# The softmax statistics of kernels for GPUs cannot be named: their forward pass is recomputed.
ATTENTION_CHECKPOINT = "attention"
LANES = 128  # block sizes of splash attention are multiples of it; the largest block on a GPU
# Largest block size for which the float32 scores of a block and their operands fit into VMEM.
LARGEST_BLOCK = 640
# Below this number of queries or keys, padding to whole blocks costs more than storing the scores.
MIN_LENGTH = 256


class Kernel(NamedTuple):
    """A fused kernel, and the form in which it gets the pattern of attention."""

    attend: Callable
    form: Literal["all", "causal", "segments", "mask"]


def kernel_for(
    q: jax.Array, k: jax.Array, cap: float | None, mask, pattern: SegmentPattern | None
) -> Kernel | None:
    """Returns the fused kernel for these inputs on the current platform, or None.

    The choice depends on shapes, types and the fields of `pattern` that are not arrays.

    Args:
      q: queries (B, S, N, H).
      k: keys (B, K, T, H).
      cap: softcap of the scores, or None.
      mask: (#B, 1, #S, T) bool; None: all keys.
      pattern: set if `mask` is this pattern and nothing else.
    """
    platform = axes.platform()
    shortest = min(q.shape[1], k.shape[2])
    form = _form(mask, pattern)
    if platform == "tpu" and shortest >= MIN_LENGTH:
        return Kernel(splash_attention, form)
    if platform not in ("gpu", "cuda") or not _fits_gpu(q, cap):
        return None
    if form != "segments":
        return Kernel(cudnn_attention, form)
    if pattern.window is None and shortest >= MIN_LENGTH:
        return Kernel(pallas_attention, form)
    return Kernel(cudnn_attention, "mask")


def _form(mask, pattern: SegmentPattern | None) -> str:
    if pattern is not None:
        return "causal" if pattern.one_segment else "segments"
    return "all" if mask is None else "mask"


def _fits_gpu(q, cap) -> bool:
    """True for several queries in half precision, heads of at most 128, and no softcap."""
    length, head_dim = q.shape[1], q.shape[3]
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits_head = head_dim % 8 == 0 and head_dim <= 128
    return is_half and fits_head and cap is None and length > 1


def fused_attention(
    kernel: Kernel, q, k, v, mask, scale: float, cap: float | None, pattern: SegmentPattern | None
):
    """`attention.dot_product_attention` by `kernel`, with the pattern in the form that it takes."""
    attend = partial(kernel.attend, q, k, v, scale=scale, cap=cap)
    if kernel.form in ("all", "mask"):
        return attend(mask=mask)
    if kernel.form == "segments":
        attend = partial(attend, segment_ids=pattern.segments)
    attend = partial(attend, causal=pattern.causal)
    if pattern.window is None:
        return attend()
    with_window = partial(attend, window=pattern.window)
    if pattern.has_window is None:
        return with_window()
    # Layers with and without a window share a program, but a kernel has one window.
    return jax.lax.cond(pattern.has_window, with_window, attend)


def cudnn_attention(
    q,
    k,
    v,
    scale: float,
    cap: None = None,
    mask=None,
    causal: bool = False,
    window: int | None = None,
    implementation: str = "cudnn",
):
    """`attention.dot_product_attention` by cuDNN, for inputs that `kernel_for` lets through.

    Odd lengths are padded: JAX differentiates cuDNN's attention for even lengths only (0.11.2).
    """
    del cap
    (rows, length), keys = q.shape[:2], k.shape[2]
    key_lengths = None
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys))
        mask = _pad_to_multiple(_pad_to_multiple(mask, axis=2, of=2), axis=3, of=2)
    elif not causal and keys % 2:
        key_lengths = jnp.full(rows, keys, jnp.int32)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # (B, T, K, H)
    q, k, v = [_pad_to_multiple(x, axis=1, of=2) for x in (q, k, v)]
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=key_lengths,
        # A window over all keys is none.
        local_window_size=(window - 1, 0) if window is not None and window < keys else None,
        implementation=implementation,
    )
    return y[:, :length]


def pallas_attention(
    q, k, v, scale: float, segment_ids, cap: None = None, causal: bool = True, interpret=False
):
    """`attention.dot_product_attention` by JAX's Pallas kernel for GPUs, within segments.

    Tokens of padding attend to each other.
    """
    # Imported here because the import takes a second.
    from jax.experimental.pallas.ops.gpu import attention as pallas

    del cap
    length, groups = q.shape[1], q.shape[2] // k.shape[1]
    # The kernel has as many key heads as query heads.
    k, v = [jnp.repeat(x.swapaxes(1, 2), groups, axis=2) for x in (k, v)]
    q, k, v = [_pad_to_multiple(x, axis=1) for x in (q, k, v)]
    segment_ids = _pad_to_multiple(segment_ids, axis=1)
    # Blocks of the forward pass fit the shared memory of small GPUs with heads of 128, too.
    block = LANES if q.shape[3] <= 64 else LANES // 2
    blocks = replace(pallas.BlockSizes.get_default(), block_q=block, block_k=block)

    def attend(q, k, v, segment_ids):
        return pallas.mha(q, k, v, segment_ids, scale, causal, blocks, interpret=interpret)

    # XLA cannot partition a Pallas kernel, so each device is given its rows and heads.
    input_letters = ("B S N H", "B T N H", "B T N H", "B S")
    return axes.shard_mapped(attend, input_letters, "B S N H")(q, k, v, segment_ids)[:, :length]


def splash_attention(
    q,
    k,
    v,
    scale: float,
    cap: float | None = None,
    mask=None,
    causal: bool = False,
    segment_ids=None,
    window: int | None = None,
    interpret: bool = False,
):
    """`attention.dot_product_attention` by splash attention.

    The results differ for a query without a visible key: it gets the value of key 0, and not the
    mean of all values. With `segment_ids`, tokens of padding attend to each other.
    """
    (rows, length), (kv_heads, keys) = q.shape[:2], k.shape[1:3]
    q = einops.rearrange(q * scale, "B S (K G) H -> B K G S H", K=kv_heads)
    # The kernel takes whole blocks.
    q, k, v = _pad_to_multiple(q, axis=3), _pad_to_multiple(k, axis=2), _pad_to_multiple(v, axis=2)
    if mask is not None:
        y = _splash_masked(q, k, v, _padded_mask(mask, rows, length, keys), cap, interpret)
    else:
        ids = _segments_of_blocks(segment_ids, rows, q.shape[3], k.shape[2], keys, causal)
        y = _splash_static(q, k, v, ids, causal, window, cap, interpret)
    return einops.rearrange(y, "B K G S H -> B S (K G) H")[:, :length]


def _pad_to_multiple(x, axis: int, of: int = LANES):
    """Pads an axis with zeros to a multiple of `of`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % of)
    return jnp.pad(x, widths)


def _segments_of_blocks(
    segment_ids, rows: int, queries: int, padded_keys: int, keys: int, causal: bool
):
    """Returns segment ids of whole blocks of queries (B, S) and keys (B, T); (): none needed."""
    if segment_ids is not None:
        segment_ids = _pad_to_multiple(segment_ids, axis=1)
        return segment_ids, segment_ids
    if causal or keys == padded_keys:
        return ()
    is_padding = jnp.broadcast_to(jnp.arange(padded_keys) >= keys, (rows, padded_keys))
    return jnp.zeros((rows, queries), jnp.int32), is_padding.astype(jnp.int32)


def _splash_static(
    q, k, v, segment_ids, causal: bool, window: int | None, cap: float | None, interpret: bool
):
    """(B, K, G, S, H), 2 x (B, K, T, H) -> (B, K, G, S, H), with a mask known while tracing.

    Args:
      segment_ids: of queries (B, S) and of keys (B, T), or ().
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = q.shape[3], k.shape[2]
    if not causal:
        mask = masks.FullMask(shape)
    elif window is None:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, (window - 1, 0), offset=0)

    def attend(q, k, v, *segment_ids):
        heads = masks.MultiHeadMask([mask] * (q.shape[1] * q.shape[2]))
        kernel = _make_kernel(heads, *shape, cap, interpret)

        def attend_in_row(q, k, v, *ids):
            ids = splash.SegmentIds(*ids) if ids else None
            return kernel(q.reshape(-1, *q.shape[2:]), k, v, ids)

        return jax.vmap(attend_in_row)(q, k, v, *segment_ids).reshape(q.shape)

    # XLA cannot partition a Pallas kernel, so each device is given its rows and heads.
    input_letters = ("B K G S H", "B K T H", "B K T H", *("B S", "B T")[: len(segment_ids)])
    return axes.shard_mapped(attend, input_letters, "B K G S H")(q, k, v, *segment_ids)


def _padded_mask(mask, rows: int, length: int, keys: int):
    """(#B, 1, #S, T) -> (B, 1, S, T), padded to whole blocks."""
    mask = jnp.broadcast_to(mask, (rows, 1, length, keys))
    mask = _pad_to_multiple(_pad_to_multiple(mask, axis=2), axis=3)
    # Splash attention returns NaN for a query with no visible key: let such a query see key 0.
    return mask | ((jnp.arange(mask.shape[3]) == 0) & ~mask.any(-1, keepdims=True))


def _splash_masked(q, k, v, mask, cap: float | None, interpret: bool):
    """(B, K, G, S, H), 2 x (B, K, T, H), (B, 1, S, T) -> (B, K, G, S, H)."""

    def attend_in_row(q, k, v, mask):
        kernel = _make_kernel(mask, q.shape[2], k.shape[1], cap, interpret)
        # Under tracing `is_dynamic_mask` has become an array, but the kernel branches on it in
        # Python: set it back to True, its value for a mask that is an array.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(q.reshape(-1, *q.shape[2:]), k, v).reshape(q.shape)

    def attend(*arrays):
        return jax.lax.map(lambda row: attend_in_row(*row), arrays)

    # XLA cannot partition a Pallas kernel, so each device is given its rows and heads.
    input_letters = ("B K G S H", "B K T H", "B K T H", "B 1 S T")
    return axes.shard_mapped(attend, input_letters, "B K G S H")(q, k, v, mask)


def _make_kernel(mask, length: int, keys: int, cap: float | None, interpret: bool):
    """Returns the kernel of one row: (K * G, S, H), 2 x (K, T, H) -> (K * G, S, H)."""
    # Imported here because the import takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    block_q, block_kv = _block_size(length), _block_size(keys)
    block_sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha(
        mask,
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION_CHECKPOINT,
    )


def _block_size(length: int) -> int:
    """Largest block size that divides `length`, a multiple of LANES."""
    sizes = range(LANES, LARGEST_BLOCK + 1, LANES)
    return max(size for size in sizes if length % size == 0)
