"""The layers everything is made of: a product, a norm, an MLP, an embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.config import ConfigError, Transformer

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
}
embedding_init = nn.initializers.normal(0.02)


def softcap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """cap * tanh(x / cap); 0 leaves x as it is (Gemma 2, section 2)."""
    return cap * jnp.tanh(x / cap) if cap else x


@jax.custom_vjp
def matmul(x: Float[Array, "... D"], w: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """`x @ w` whose weight gradient is one product of two matrices.

    In the plain backward pass XLA fuses what comes before into a strided transpose and computes it again; the barrier
    stops that.
    """
    return x @ w


def _matmul_forward(x, w):
    return x @ w, (x, w)


def _matmul_backward(saved, dy):
    x, w = saved
    flat_x, flat_dy = jax.lax.optimization_barrier(
        (x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
    )
    return (flat_dy @ w.T).reshape(x.shape), _weight_gradient(flat_x, flat_dy)


def _weight_gradient(x, dy):
    """(P, D), (P, F) -> (D, F), the product of x transposed and dy.

    XLA:CPU has a faster kernel for products whose first matrix is contracted over its columns, so the narrower x is
    transposed there, before a barrier that keeps XLA from taking it back.
    """
    if axes.platform() == "cpu" and x.shape[1] <= dy.shape[1]:
        return jax.lax.optimization_barrier(x.T) @ dy
    return jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """(..., inputs) -> (..., outputs): a product over the first `contract` letters of the kernel, and a bias.

    `Dense("D N H", (128, 4, 32))` maps (B, S, D) to (B, S, N, H); `Dense("N H D", (4, 32, 128), contract=2)` maps back.
    It computes in the kernel's dtype.
    """

    letters: str
    shape: tuple[int, ...]
    contract: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs, outputs = self.shape[: self.contract], self.shape[self.contract :]
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=range(self.contract),
            out_axis=range(self.contract, len(self.shape)),
        )
        kernel = self.param("kernel", axes.with_axes(init, self.letters), self.shape)
        leading = x.shape[: x.ndim - self.contract]
        x = x.reshape(*leading, math.prod(inputs)).astype(kernel.dtype)
        y = matmul(x, kernel.reshape(math.prod(inputs), math.prod(outputs)))
        if self.bias:
            letters = " ".join(self.letters.split()[self.contract :])
            y += self.param(
                "bias", axes.with_axes(nn.initializers.zeros, letters), outputs
            ).reshape(-1)
        return y.reshape(*leading, *outputs)


class Norm(nn.Module):
    """(..., D) -> (..., D): LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), computed in float32.

    `rmsnorm_zero_centered` keeps its scale minus 1, so that 0 changes nothing (Gemma).
    """

    kind: str
    eps: float
    letters: str = "D"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        centred = self.kind == "rmsnorm_zero_centered"
        init = nn.initializers.zeros if centred else nn.initializers.ones
        scale = self.param("scale", axes.with_axes(init, self.letters), x.shape[-1:])
        wide = x.astype(jnp.float32)
        if self.kind == "layernorm":
            wide -= wide.mean(-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        if centred:
            return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        y = wide.astype(x.dtype) * scale
        if self.kind == "layernorm":
            y += self.param(
                "bias", axes.with_axes(nn.initializers.zeros, self.letters), x.shape[-1:]
            )
        return y


class Mlp(nn.Module):
    """(B, S, D) -> (B, S, D): up, activation, down; gated, the activation of a second product scales the first."""

    cfg: Transformer

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        cfg, act = self.cfg, ACTIVATIONS[self.cfg.activation]
        up = Dense("D F", (cfg.width, cfg.mlp_width), bias=cfg.mlp_bias, name="up")(x)
        if cfg.gated_mlp:
            hidden = (
                act(Dense("D F", (cfg.width, cfg.mlp_width), bias=cfg.mlp_bias, name="gate")(x))
                * up
            )
        else:
            hidden = act(up)
        hidden = axes.constrain(hidden, "B S F")
        return Dense("F D", (cfg.mlp_width, cfg.width), bias=cfg.mlp_bias, name="down")(hidden)


class Embed(nn.Module):
    """(B, S) ids -> (B, S, D); `attend` is the tied output head, (B, S, D) -> (B, S, V).

    Ids outside the table raise ConfigError, unless they are traced: within `jax.jit` their embeddings are NaN.
    """

    num: int
    width: int
    letters: str = "V D"

    def setup(self):
        self.table = self.param(
            "table", axes.with_axes(embedding_init, self.letters), (self.num, self.width)
        )

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        check_ids(ids, self.num, axes.ALPHABET[self.letters.split()[0]].meaning)
        return axes.lookup(self.table, ids, self.letters)

    def attend(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        return matmul(x, self.table.T)


def check_ids(ids, rows: int, table: str) -> None:
    """Raises ConfigError for ids that are not among the rows of a table. Values that a trace hides are not checked."""
    if isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True):
        return
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= rows)]
    if outside.size:
        raise ConfigError(f"id {outside[0]} is outside the table of {rows} rows ({table}).")
