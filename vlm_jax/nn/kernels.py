"""Attention on accelerators by kernels of libraries, which hold no scores in memory; where they serve, and which.

GPU: cuDNN's, through `jax.nn`. TPU: JAX's splash attention in Pallas (Dao et al. 2022, without blocks that the mask
leaves empty). Its mask is one row's, so that rows follow each other; a row alone fills a chip's core. Tokamax has the
same kernel, refuses masks that differ between rows, and cannot be installed beside tyro (0.0.12: typeguard 2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlm_jax import axes

KEPT = "attention"  # the name of what `remat` "attention" keeps of it; cuDNN's sums have none, so it computes again
LANES = 128  # a block's sides are multiples of it
LARGEST_BLOCK = (
    640  # scores of a block, float32, and what they are made from fit the fast memory of a core
)
MIN_LENGTH = (
    256  # queries and keys: below, the padding to blocks costs more than the scores in memory
)


def kernel_for(q: jax.Array, k: jax.Array, mask: jax.Array | None, cap: float) -> Callable | None:
    """The kernel that takes the place of `attend` on the platform at hand; None where none can or none is worth it."""
    platform, length, keys = axes.platform(), q.shape[1], k.shape[2]
    if platform == "tpu" and min(length, keys) >= MIN_LENGTH:
        return on_tpu
    even = length % 2 == keys % 2 == 0  # what cuDNN asks for beside a mask
    narrow = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return (
        on_gpu
        if platform in ("gpu", "cuda") and narrow and not cap and (mask is None or even)
        else None
    )


def on_gpu(q, k, v, mask, scale: float, cap: float = 0.0, implementation: str = "cudnn"):
    """As `attend`, for bfloat16 or float16, heads of at most 128 numbers and without a cap."""
    del cap
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[2]))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, implementation=implementation
    )


def on_tpu(q, k, v, mask, scale: float, cap: float = 0.0, interpret: bool = False):
    """As `attend`; but a query that sees nothing gets the first value, where `attend` gives the mean of all."""
    (rows, length, heads, width), (kv_heads, keys) = q.shape, k.shape[1:3]
    padding = [-size % LANES for size in (length, keys)]
    q = (
        (q * scale)
        .reshape(rows, length, kv_heads, heads // kv_heads, width)
        .transpose(0, 2, 3, 1, 4)
    )
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, padding[0]), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding[1]), (0, 0))) for x in (k, v))
    mask = jnp.ones((1, 1, 1, keys), bool) if mask is None else mask
    mask = jnp.broadcast_to(mask, (rows, 1, length, keys))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, padding[0]), (0, padding[1])))
    mask |= (jnp.arange(mask.shape[3]) == 0) & ~mask.any(
        -1, keepdims=True
    )  # of no keys at all it makes NaN

    def by_row(q, k, v, mask):
        return jax.lax.map(lambda row: _row(*row, cap, interpret), (q, k, v, mask))

    y = axes.shard_mapped(by_row, ("B K G S H", "B K T H", "B K T H", "B 1 S T"), "B K G S H")(
        q, k, v, mask
    )
    return y.transpose(0, 3, 1, 2, 4).reshape(rows, -1, heads, width)[:, :length]


def _row(q, k, v, mask, cap: float, interpret: bool):
    """(K, G, S, H), (K, T, H), (K, T, H), (1, S, T) -> (K, G, S, H)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,  # a second to import
    )

    block_q, block_kv = _block(q.shape[2]), _block(k.shape[1])
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    settings = {
        "attn_logits_soft_cap": cap or None,
        "interpret": interpret,
        "residual_checkpoint_name": KEPT,
    }
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, **settings
    )
    # Traced, the mark has become an array that Python cannot ask.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(q.reshape(-1, *q.shape[2:]), k, v).reshape(q.shape)


def _block(length: int) -> int:
    """The largest that cuts a multiple of LANES evenly."""
    return max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)
