"""Fused attention kernels, which never materialise the scores, and when to use them.

GPU: cuDNN, through `jax.nn.dot_product_attention`. TPU: JAX's splash attention, a Pallas kernel of
FlashAttention (Dao et al. 2022) that skips the blocks the mask leaves empty.

Splash attention takes one mask for all rows of a batch, so the rows are processed one after
another; one row fills a TPU core. Tokamax has the same kernel, but no masks that differ between
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


def kernel_for(
    q: jax.Array, k: jax.Array, mask: jax.Array | None, cap: float | None
) -> Callable | None:
    """Returns the fused kernel for these inputs on the current platform, or None.

    Args:
      q: queries (B, S, N, H).
      k: keys (B, K, T, H).
      mask: (B, 1, S, T) or None.
      cap: softcap of the scores, or None.
    """
    platform = axes.platform()
    length, keys = q.shape[1], k.shape[2]
    if platform == "tpu" and min(length, keys) >= MIN_LENGTH:
        return splash_attention
    if platform in ("gpu", "cuda") and _fits_cudnn(q, keys, mask, cap):
        return cudnn_attention
    return None


def _fits_cudnn(q, keys, mask, cap) -> bool:
    """True for half precision, heads of at most 128, no softcap and, with a mask, even lengths."""
    length, head_dim = q.shape[1], q.shape[3]
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    is_even = length % 2 == 0 and keys % 2 == 0
    fits_head = head_dim % 8 == 0 and head_dim <= 128
    return is_half and fits_head and cap is None and (mask is None or is_even)


def cudnn_attention(
    q, k, v, mask, scale: float, cap: float | None = None, implementation: str = "cudnn"
):
    """`attention.dot_product_attention` by cuDNN, for inputs that `kernel_for` lets through."""
    del cap
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[2]))
    k = k.swapaxes(1, 2)  # (B, T, K, H)
    v = v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, implementation=implementation
    )


def splash_attention(
    q, k, v, mask, scale: float, cap: float | None = None, interpret: bool = False
):
    """`attention.dot_product_attention` by splash attention.

    The results differ for a query without a visible key: it gets the value of key 0, and not the
    mean of all values.
    """
    (rows, length, _, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    q = einops.rearrange(q * scale, "B S (K G) H -> B K G S H", K=kv_heads)

    # Pad queries and keys to whole blocks; the mask hides the padding keys.
    query_padding = (0, -length % LANES)
    key_padding = (0, -keys % LANES)
    no_padding = (0, 0)
    q = jnp.pad(q, (no_padding, no_padding, no_padding, query_padding, no_padding))
    k = jnp.pad(k, (no_padding, no_padding, key_padding, no_padding))
    v = jnp.pad(v, (no_padding, no_padding, key_padding, no_padding))
    mask = jnp.ones((1, 1, 1, keys), bool) if mask is None else mask
    mask = jnp.broadcast_to(mask, (rows, 1, length, keys))
    mask = jnp.pad(mask, (no_padding, no_padding, query_padding, key_padding))

    # Splash attention returns NaN for a query with no visible key: let such a query see key 0.
    mask |= (jnp.arange(mask.shape[3]) == 0) & ~mask.any(-1, keepdims=True)

    def row_by_row(q, k, v, mask):
        return jax.lax.map(lambda row: _splash_row(*row, cap, interpret), (q, k, v, mask))

    # XLA cannot partition a Pallas kernel, so each device is given its rows and heads.
    input_letters = ("B K G S H", "B K T H", "B K T H", "B 1 S T")
    y = axes.shard_mapped(row_by_row, input_letters, "B K G S H")(q, k, v, mask)
    return einops.rearrange(y, "B K G S H -> B S (K G) H")[:, :length]


def _splash_row(q, k, v, mask, cap: float | None, interpret: bool):
    """One row: (K, G, S, H), (K, T, H), (K, T, H), (1, S, T) -> (K, G, S, H)."""
    # Imported here because the import takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    block_q = _block_size(q.shape[2])
    block_kv = _block_size(k.shape[1])
    block_sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kernel = splash.make_splash_mha(
        mask,
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION_CHECKPOINT,
    )
    # Under tracing `is_dynamic_mask` has become an array, but the kernel branches on it in Python:
    # set it back to True, its value for a mask that is an array.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(q.reshape(-1, *q.shape[2:]), k, v).reshape(q.shape)


def _block_size(length: int) -> int:
    """Largest block size that divides `length`, a multiple of LANES."""
    sizes = range(LANES, LARGEST_BLOCK + 1, LANES)
    return max(size for size in sizes if length % size == 0)
