"""Fused attention kernels, which never materialise the scores, and when to use them.

GPU: cuDNN, through `jax.nn.dot_product_attention`. TPU: JAX's splash attention, a Pallas kernel of
FlashAttention (Dao et al. 2022) that skips the blocks the mask leaves empty.

Where tokens attend causally within segments, splash attention gets segment ids: the kernel skips
the blocks above the diagonal, and no mask exists in memory. Other masks are arrays, of which it
takes one for all rows of a batch, so the rows are processed one after another; one row fills a TPU
core. Tokamax has the same kernel, but no masks that differ between
rows, and cannot be installed beside tyro (0.0.12 pins typeguard 2).
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp

from vlm_jax import axes

# Name under which `remat` "attention" saves attention's inputs and output (`jax.ad_checkpoint`).
# cuDNN's softmax statistics cannot be named: its forward pass is recomputed.
ATTENTION_CHECKPOINT = "attention"
LANES = 128  # splash attention's block sizes are multiples of it
# Largest block size for which the float32 scores of a block and their operands fit into VMEM.
LARGEST_BLOCK = 640
# Below this number of queries or keys, padding to whole blocks costs more than storing the scores.
MIN_LENGTH = 256


def kernel_for(q: jax.Array, k: jax.Array, cap: float | None) -> Callable | None:
    """Returns the fused kernel for these inputs on the current platform, or None.

    Args:
      q: queries (B, S, N, H).
      k: keys (B, K, T, H).
      cap: softcap of the scores, or None.
    """
    platform = axes.platform()
    length, keys = q.shape[1], k.shape[2]
    if platform == "tpu" and min(length, keys) >= MIN_LENGTH:
        return splash_attention
    if platform in ("gpu", "cuda") and _fits_cudnn(q, keys, cap):
        return cudnn_attention
    return None


def _fits_cudnn(q, keys, cap) -> bool:
    """True for half precision, heads of at most 128, no softcap and even lengths.

    JAX differentiates cuDNN's attention for even lengths only, without a mask too (0.11.2).
    """
    length, head_dim = q.shape[1], q.shape[3]
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    is_even = length % 2 == 0 and keys % 2 == 0
    fits_head = head_dim % 8 == 0 and head_dim <= 128
    return is_half and fits_head and cap is None and is_even


def cudnn_attention(
    q,
    k,
    v,
    mask,
    scale: float,
    cap: float | None = None,
    causal_segments=None,
    implementation: str = "cudnn",
):
    """`attention.dot_product_attention` by cuDNN, for inputs that `kernel_for` lets through."""
    del cap, causal_segments
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[2]))
    k = k.swapaxes(1, 2)  # (B, T, K, H)
    v = v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, implementation=implementation
    )


def splash_attention(
    q, k, v, mask, scale: float, cap: float | None = None, causal_segments=None, interpret=False
):
    """`attention.dot_product_attention` by splash attention.

    The results differ for a query without a visible key: it gets the value of key 0, and not the
    mean of all values. With `causal_segments`, tokens of padding attend to each other.
    """
    (rows, length), (kv_heads, keys) = q.shape[:2], k.shape[1:3]
    q = einops.rearrange(q * scale, "B S (K G) H -> B K G S H", K=kv_heads)
    # The kernel takes whole blocks.
    q, k, v = _pad_to_blocks(q, axis=3), _pad_to_blocks(k, axis=2), _pad_to_blocks(v, axis=2)
    if causal_segments is not None:
        y = _splash_causal(q, k, v, causal_segments, cap, interpret)
    else:
        y = _splash_masked(q, k, v, _padded_mask(mask, rows, length, keys), cap, interpret)
    return einops.rearrange(y, "B K G S H -> B S (K G) H")[:, :length]


def _pad_to_blocks(x, axis: int):
    """Pads an axis with zeros to a multiple of LANES."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, widths)


def _splash_causal(q, k, v, segment_ids, cap: float | None, interpret: bool):
    """(B, K, G, S, H), 2 x (B, K, S, H), (B, S) -> (B, K, G, S, H), causal within segments."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    segment_ids = _pad_to_blocks(segment_ids, axis=1)
    length = segment_ids.shape[1]

    def attend(q, k, v, segment_ids):
        heads = q.shape[1] * q.shape[2]
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
        kernel = _make_kernel(mask, length, length, cap, interpret)

        def attend_in_row(q, k, v, ids):
            return kernel(q.reshape(-1, *q.shape[2:]), k, v, splash.SegmentIds(ids, ids))

        return jax.vmap(attend_in_row)(q, k, v, segment_ids).reshape(q.shape)

    # XLA cannot partition a Pallas kernel, so each device is given its rows and heads.
    input_letters = ("B K G S H", "B K T H", "B K T H", "B S")
    return axes.shard_mapped(attend, input_letters, "B K G S H")(q, k, v, segment_ids)


def _padded_mask(mask, rows: int, length: int, keys: int):
    """(#B, 1, #S, T) or None (all keys) -> (B, 1, S, T), padded to whole blocks."""
    mask = jnp.ones((1, 1, 1, keys), bool) if mask is None else mask
    mask = jnp.broadcast_to(mask, (rows, 1, length, keys))
    mask = _pad_to_blocks(_pad_to_blocks(mask, axis=2), axis=3)
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
