"""Self- and cross-attention in one module, with grouped-query heads, RoPE and a KV cache."""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.config import Transformer
from vlm_jax.nn.kernels import ATTENTION_CHECKPOINT, fused_attention, kernel_for
from vlm_jax.nn.layers import Dense, Norm, softcap
from vlm_jax.nn.positions import RopeTables
from vlm_jax.structs import SegmentPattern

# Cached with the heads in front, so that the keys of one head are contiguous.
KeyValue = tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]
# Score of a masked key. It is finite, so that a query whose keys are all masked gives no NaN.
MASK_VALUE = -1e30
FEW_QUERIES = 8  # per key head; up to this number `_scores` has the keys first on a CPU
# Collections of Flax variables, which only exist if `apply` is asked for them: the attention
# weights (mutable), and arrays that are added to them (given), which have their gradient.
WEIGHTS = "attention_weights"
PERTURBATIONS = "attention_perturbations"
WEIGHT = "weights"  # name of the variable in both


def apply_rope(x: Float[Array, "B S N H"], rope: RopeTables) -> Float[Array, "B S N H"]:
    """Rotates the first R dimensions of every head by its position; the other H - R pass through.

    Su et al. 2021 (RoFormer), eq. 34, with dimension i paired with i + R/2, as in Llama.
    """
    cos, sin = rope
    cos = cos[:, :, None, :].astype(x.dtype)  # (B, S, 1, R)
    sin = sin[:, :, None, :].astype(x.dtype)
    rotary, unrotated = jnp.split(x, [cos.shape[-1]], axis=-1)
    first_half, second_half = jnp.split(rotary, 2, axis=-1)
    rotary = rotary * cos + jnp.concatenate([-second_half, first_half], axis=-1) * sin
    if unrotated.shape[-1] == 0:
        return rotary
    return jnp.concatenate([rotary, unrotated], axis=-1)


def dot_product_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: Bool[Array, "#B 1 #S T"] | None,
    scale: float | None = None,
    cap: float | None = None,
    pattern: SegmentPattern | None = None,
    observe: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "B S N H"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with grouped-query heads.

    Key/value head j serves query heads j * G to (j + 1) * G - 1, where G = N / K. Fused kernels
    replace this implementation on accelerators (`kernels.kernel_for`), unless the weights are
    observed.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: True where a query attends to a key; None: everywhere.
      scale: factor of the scores; None: 1 / sqrt(H).
      cap: c > 0 replaces each score by c * tanh(score / c) (Gemma 2); None: no cap.
      pattern: set if `mask` is this pattern and nothing else: a kernel may use it instead of the
        mask.
      observe: takes the weights (B, N, S, T) in float32, and returns the weights to use.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    q = checkpoint_name(q, ATTENTION_CHECKPOINT)
    k = checkpoint_name(k, ATTENTION_CHECKPOINT)
    kernel = kernel_for(q, k, cap, mask, pattern) if observe is None else None
    if kernel is not None:
        return fused_attention(kernel, q, k, v, mask, scale, cap, pattern)

    # The queries of the G heads that share a key head become rows of one matmul, so that keys and
    # values are not repeated.
    kv_heads = k.shape[1]
    groups = q.shape[2] // kv_heads
    q = einops.rearrange(q * scale, "B S (K G) H -> B K (G S) H", K=kv_heads)
    if mask is not None and mask.shape[2] > 1:
        mask = jnp.tile(mask, (1, 1, groups, 1))  # (B, 1, G * S, T)

    if observe is not None:
        weights = _probabilities(q, k, mask, cap)
        weights = observe(einops.rearrange(weights, "B K (G S) T -> B (K G) S T", G=groups))
        weights = einops.rearrange(weights, "B (K G) S T -> B K (G S) T", G=groups).astype(v.dtype)
        y = jnp.einsum("bkrt,bkth->bkrh", weights, v)
    elif cap is None:
        y = _attention(q, k, v, mask)
    else:
        # The custom gradient omits the derivative of tanh: JAX differentiates capped scores.
        y, _ = _attention_forward(q, k, v, mask, cap)
    return einops.rearrange(y, "B K (G S) H -> B S (K G) H", G=groups)


@jax.custom_vjp
def _attention(q, k, v, mask):
    """Attention of G * S queries per key head: (B, K, G*S, H), 2 x (B, K, T, H) -> (B, K, G*S, H).

    The backward pass keeps the inputs, the output and the probabilities, but not the scores.
    """
    return _attention_forward(q, k, v, mask)[0]


def _probabilities(q, k, mask, cap):
    """Attention weights in float32: (B, K, G*S, H), (B, K, T, H) -> (B, K, G*S, T)."""
    scores = softcap(_scores(q, k).astype(jnp.float32), cap)
    if mask is not None:
        scores = jnp.where(mask, scores, MASK_VALUE)
    return jax.nn.softmax(scores, axis=-1)


def _scores(q, k):
    """Products of queries and keys: (B, K, R, H), (B, K, T, H) -> (B, K, R, T)."""
    if axes.platform() == "cpu" and 1 < q.shape[2] <= FEW_QUERIES:
        # XLA:CPU reads the keys about twice as fast if they are the first operand. Without the
        # barrier, XLA swaps the operands back.
        scores = jax.lax.optimization_barrier(jnp.einsum("bkth,bkrh->bktr", k, q))
        return scores.swapaxes(2, 3)
    return jnp.einsum("bkrh,bkth->bkrt", q, k)


def _attention_forward(q, k, v, mask, cap=None):
    probabilities = _probabilities(q, k, mask, cap).astype(q.dtype)
    probabilities = checkpoint_name(probabilities, ATTENTION_CHECKPOINT)
    y = jnp.einsum("bkrt,bkth->bkrh", probabilities, v)
    y = checkpoint_name(y, ATTENTION_CHECKPOINT)
    return y, (q, k, v, probabilities, y)


def _attention_backward(residuals, dy):
    """Gradients of q, k and v.

    The softmax needs sum(dp * p) over T. It equals sum(dy * y) over H, which is cheaper
    (Dao et al. 2022, FlashAttention, section B.2).
    """
    q, k, v, p, y = residuals
    # dy and ds are each read by two matmuls that want different layouts. The barriers have XLA
    # compute them once instead of fusing their producers into both matmuls.
    dy = jax.lax.optimization_barrier(dy)
    total = jnp.sum((dy * y).astype(jnp.float32), axis=-1, keepdims=True).astype(dy.dtype)
    dv = jnp.einsum("bkrt,bkrh->bkth", p, dy)
    dp = jnp.einsum("bkrh,bkth->bkrt", dy, v)
    ds = jax.lax.optimization_barrier(p * (dp - total))
    dq = jnp.einsum("bkrt,bkth->bkrh", ds, k)
    dk = jnp.einsum("bkrt,bkrh->bkth", ds, q)
    return dq, dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)


def _update(cached, new, index):
    """Returns cached keys or values (B, K, T, H) with new ones from slot `index` on."""
    if len(cached) == 1:
        # Without a batch axis, as in `generate.unstack_cache`: XLA:CPU then updates in place.
        return jax.lax.dynamic_update_slice_in_dim(cached[0], new[0], index, axis=1)[None]
    return jax.lax.dynamic_update_slice_in_dim(cached, new, index, axis=2)


class Attention(nn.Module):
    """Attention with queries from `x` and keys and values from `kv_input` (self-attention: `x`).

    With a KV cache of length T, the new keys and values are written from slot `index` on, and the
    queries attend to all T slots. Without `kv_input`, the cached keys and values are used as they
    are (cross-attention while decoding).

    Returns:
      The output, and the keys and values it attended to (the updated cache).
    """

    cfg: Transformer
    qk_norm: str = "none"  # a value of `Transformer.qk_norm`

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        kv_input: Float[Array, "B length E"] | None,
        mask: Bool[Array, "#B 1 #S T"] | None = None,
        rope: RopeTables | None = None,
        cache: KeyValue | None = None,
        index: Int[Array, ""] | None = None,
        pattern: SegmentPattern | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValue]:
        cfg = self.cfg
        q = axes.constrain(self._project(x, "query", "N"), "B S N H")
        if rope is not None:
            q = apply_rope(q, rope)
        if kv_input is None:
            k, v = cache
        else:
            k, v = self._keys_and_values(kv_input, rope)
            if cache is not None:
                k, v = (_update(*pair, index) for pair in zip(cache, (k, v), strict=True))
        is_observed = self.is_mutable_collection(WEIGHTS) and not self.is_initializing()
        observe = self._observe if is_observed else None
        y = dot_product_attention(
            q, k, v, mask, cfg.query_scale, cfg.score_softcap, pattern, observe
        )
        shape = (cfg.heads, cfg.head_width, cfg.width)
        out = Dense("N H D", shape, contract=2, bias=cfg.out_bias, name="out")(y)
        return out, (k, v)

    def _observe(self, weights):
        """Stores the attention weights, (B, N, S, T), and adds their perturbation if one exists."""
        self.sow(WEIGHTS, WEIGHT, weights, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        if self.has_variable(PERTURBATIONS, WEIGHT):
            weights = weights + self.get_variable(PERTURBATIONS, WEIGHT)
        return weights

    def _keys_and_values(self, kv_input, rope):
        """(B, length, E) -> keys and values, (B, K, length, H) each."""
        k = self._project(kv_input, "key", "K")
        v = self._project(kv_input, "value", "K")
        if rope is not None:
            k = apply_rope(k, rope)
        return k.swapaxes(1, 2), v.swapaxes(1, 2)

    def _project(self, x, name, heads_letter):
        """(B, S, D) -> (B, S, N, H) or (B, S, K, H), with the norm of queries and keys."""
        cfg = self.cfg
        heads = cfg.heads if heads_letter == "N" else cfg.num_kv_heads
        letters = f"D {heads_letter} H"
        shape = (x.shape[-1], heads, cfg.head_width)
        x = Dense(letters, shape, bias=cfg.has_bias(name), name=name)(x)
        if self.qk_norm != "none" and name != "value":
            normed = {"head": "H", "all_heads": f"{heads_letter} H"}[self.qk_norm]
            x = Norm(cfg.norm, cfg.norm_eps, letters=normed, name=f"{name}_norm")(x)
        return x
