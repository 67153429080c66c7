"""Attention: one module for self- and cross-attention, with grouped-query heads, RoPE and a cache."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.config import Transformer
from vlm_jax.nn.kernels import KEPT, kernel_for
from vlm_jax.nn.layers import Dense, Norm, softcap

KeyValue = tuple[
    Float[Array, "B K T H"], Float[Array, "B K T H"]
]  # as they are cached: a head's keys lie together
Rope = tuple[Float[Array, "B S R"], Float[Array, "B S R"]]  # cosines and sines
MASK_VALUE = (
    -1e30
)  # the score of a key that is not seen; finite, so that a row that sees nothing gives no NaN


def apply_rope(x: Float[Array, "B S N H"], rope: Rope) -> Float[Array, "B S N H"]:
    """Turns the first R numbers of every head by the angles of its position; the rest passes through."""
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in rope)
    turned, rest = jnp.split(x, [cos.shape[-1]], axis=-1)
    low, high = jnp.split(turned, 2, axis=-1)
    turned = turned * cos + jnp.concatenate([-high, low], axis=-1) * sin
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def attend(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: Bool[Array, "#B 1 #S T"] | None,
    scale: float = 0.0,
    cap: float = 0.0,
) -> Float[Array, "B S N H"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); key head j serves query heads jN/K .. (j+1)N/K - 1.

    The queries of all heads that share a key head are rows of one product, so that no key is repeated. `scale` 0 stands
    for 1 / sqrt(H); with `cap` c the scores become c tanh(score / c) (Gemma 2). On accelerators kernels of libraries
    compute the same without holding the scores.
    """
    rows, length, heads, width = q.shape
    q, k, scale = checkpoint_name(q, KEPT), checkpoint_name(k, KEPT), scale or width**-0.5
    kernel = kernel_for(q, k, mask, cap)
    if kernel is not None:
        return kernel(q, k, v, mask, scale, cap)
    grouped = rows, length, k.shape[1], heads // k.shape[1], width
    q = (q * scale).reshape(grouped).transpose(0, 2, 3, 1, 4)
    q, by_group = q.reshape(rows, k.shape[1], -1, width), q.shape
    if mask is not None and mask.shape[2] > 1:
        mask = jnp.tile(mask, (1, 1, grouped[3], 1))
    y = _attend_forward(q, k, v, mask, cap)[0] if cap else _attend(q, k, v, mask)
    return y.reshape(by_group).transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


@jax.custom_vjp
def _attend(q, k, v, mask):
    """(B, K, R, H), (B, K, T, H), (B, K, T, H) -> (B, K, R, H), R queries a key head; its backward pass keeps only the
    probabilities beside its inputs and output."""
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask, cap=0.0):
    scores = softcap(jnp.einsum("bkrh,bkth->bkrt", q, k).astype(jnp.float32), cap)
    if mask is not None:
        scores = jnp.where(mask, scores, MASK_VALUE)
    probabilities = checkpoint_name(jax.nn.softmax(scores, axis=-1).astype(q.dtype), KEPT)
    y = checkpoint_name(jnp.einsum("bkrt,bkth->bkrh", probabilities, v), KEPT)
    return y, (q, k, v, probabilities, y)


def _attend_backward(saved, dy):
    """Dao et al. 2022 (FlashAttention), section B.2: the sum over dp * p is that over dy * y, which is shorter."""
    q, k, v, p, y = saved
    dy = jax.lax.optimization_barrier(dy)
    total = jnp.sum((dy * y).astype(jnp.float32), axis=-1, keepdims=True).astype(dy.dtype)
    dv = jnp.einsum("bkrt,bkrh->bkth", p, dy)
    dp = jnp.einsum("bkrh,bkth->bkrt", dy, v)
    ds = jax.lax.optimization_barrier(p * (dp - total))
    return jnp.einsum("bkrt,bkth->bkrh", ds, k), jnp.einsum("bkrt,bkrh->bkth", ds, q), dv, None


_attend.defvjp(_attend_forward, _attend_backward)


class Attention(nn.Module):
    """Queries from `x`, keys and values from `source`: self-attention where the two are one.

    With a cache of fixed length T, the keys and values of `source` are written from slot `index` on and all T slots are
    attended to. Without a source, the cached keys and values are read as they are (cross-attention while decoding).
    """

    cfg: Transformer
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        source: Float[Array, "B length E"] | None,
        mask: Bool[Array, "#B 1 #S T"] | None = None,
        rope: Rope | None = None,
        cache: KeyValue | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValue]:
        cfg = self.cfg
        q = axes.constrain(self._project(x, "query", "N"), "B S N H")
        q = apply_rope(q, rope) if rope is not None else q
        if source is None:
            k, v = cache
        else:
            k, v = self._project(source, "key", "K"), self._project(source, "value", "K")
            k = apply_rope(k, rope) if rope is not None else k
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            if cache is not None:
                k, v = (
                    jax.lax.dynamic_update_slice_in_dim(old, new, index, 2)
                    for old, new in zip(cache, (k, v))
                )
        y = attend(q, k, v, mask, cfg.query_scale, cfg.score_softcap)
        out = Dense(
            "N H D",
            (cfg.heads, cfg.head_width, cfg.width),
            contract=2,
            bias=cfg.out_bias,
            name="out",
        )(y)
        return out, (k, v)

    def _project(self, x, name, heads_letter):
        cfg = self.cfg
        heads = cfg.heads if heads_letter == "N" else cfg.num_kv_heads
        x = Dense(
            f"D {heads_letter} H",
            (x.shape[-1], heads, cfg.head_width),
            bias=cfg.qkv_bias,
            name=name,
        )(x)
        if self.qk_norm and name != "value":
            x = Norm(cfg.norm, cfg.norm_eps, letters="H", name=f"{name}_norm")(x)
        return x
