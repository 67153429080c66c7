"""Basic layers: Dense, Norm, Mlp, Embed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.config import ConfigError, Transformer
from vlm_jax.nn import quantized
from vlm_jax.nn.quantized import is_quantized

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
}
embedding_init = nn.initializers.normal(0.02)
# Names of an adapter's parameters, beside the kernel (nn/lora.py).
LORA_A, LORA_B, LORA_DROPOUT = "lora_a", "lora_b", "lora_dropout"
NARROW = 8  # ratio of widths from which on the gradient of a narrow kernel is computed transposed


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap), or x if `cap` is None (Gemma 2, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@jax.custom_vjp
def matmul(x: Float[Array, "... D"], w: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """`x @ w` with a custom VJP that computes the weight gradient as one 2-D matmul."""
    return x @ w


def _matmul_forward(x, w):
    return x @ w, (x, w)


def _matmul_backward(residuals, dy, is_narrow=False):
    x, w = residuals
    flat_x = x.reshape(-1, x.shape[-1])  # (P, D)
    flat_dy = dy.reshape(-1, dy.shape[-1])  # (P, F)
    # Without the barrier XLA fuses the producers of x and dy into a strided transpose and computes
    # them again. On a TPU that is cheaper for narrow kernels than to read and write dy once more.
    if axes.platform() == "cpu" or not is_narrow:
        flat_x, flat_dy = jax.lax.optimization_barrier((flat_x, flat_dy))
    return (flat_dy @ w.T).reshape(x.shape), _weight_gradient(flat_x, flat_dy)


def _weight_gradient(x, dy):
    """x.T @ dy: (P, D), (P, F) -> (D, F)."""
    # XLA:CPU has a faster kernel for matmuls that contract the columns of their first operand. The
    # barrier keeps XLA from folding the transpose back into the matmul. It pays off only where the
    # transposed matrix is the narrower one.
    if axes.platform() == "cpu" and x.shape[1] <= dy.shape[1]:
        return jax.lax.optimization_barrier(x.T) @ dy
    if axes.platform() == "cpu" and NARROW * dy.shape[1] <= x.shape[1]:
        return (jax.lax.optimization_barrier(dy.T) @ x).T
    return jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def unsaved_matmul(x: Float[Array, "... A"], w: Float[Array, "A F"]) -> Float[Array, "... F"]:
    """`matmul` whose product remat recomputes: it saves products without a batch axis only."""
    dimensions = (((x.ndim,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(x[None], w[None], dimensions)[0]


def _unsaved_forward(x, w):
    return unsaved_matmul(x, w), (x, w)


unsaved_matmul.defvjp(_unsaved_forward, functools.partial(_matmul_backward, is_narrow=True))


class Dense(nn.Module):
    """Linear layer over the first `contract` axes of its kernel: (..., inputs) -> (..., outputs).

    `Dense("D N H", (128, 4, 32))` maps (B, S, D) to (B, S, N, H), and
    `Dense("N H D", (4, 32, 128), contract=2)` maps it back. The output has the kernel's dtype.

    If the parameters hold an adapter of the kernel, its output x lora_a lora_b is added. The kernel
    may be `Quantized`; then it gets no gradient.
    """

    letters: str  # logical axes of the kernel
    shape: tuple[int, ...]  # of the kernel
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
        init = axes.with_axes(init, self.letters, contracted=self.contract)
        kernel = self.get_variable("params", "kernel")
        if not is_quantized(kernel):
            kernel = self.param("kernel", init, self.shape)

        # One 2-D matmul, whatever the number of input and output axes.
        leading = x.shape[: x.ndim - self.contract]
        x = x.reshape(*leading, math.prod(inputs)).astype(kernel.dtype)
        if is_quantized(kernel):
            y = quantized.matmul(x, kernel)
        else:
            y = matmul(x, kernel.reshape(math.prod(inputs), math.prod(outputs)))
        if self.bias:
            letters = " ".join(self.letters.split()[self.contract :])
            zeros = axes.with_axes(nn.initializers.zeros, letters)
            y += self.param("bias", zeros, outputs).reshape(-1)
        if self.has_variable("params", LORA_A):
            y += self._adapt(x)
        return y.reshape(*leading, *outputs)

    def _adapt(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Returns the output of the adapter, whose scale is in `lora_b` (`lora.as_applied`)."""
        lora_a = self.get_variable("params", LORA_A)
        lora_b = self.get_variable("params", LORA_B)
        rank = lora_b.shape[0]
        if self.has_rng("dropout"):
            rate = self.get_variable("params", LORA_DROPOUT)
            is_kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape)
            x = jnp.where(is_kept, x / (1 - rate), 0).astype(x.dtype)
        hidden = matmul(x, lora_a.reshape(-1, rank))
        # The product of the kernel is saved by remat; this one is cheap to recompute.
        return unsaved_matmul(hidden, lora_b.reshape(rank, -1))


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), computed in float32.

    `rmsnorm_zero_centered` stores `scale - 1`, as in Gemma. The last axes of `x`, one for each of
    `letters`, are normalized together.
    """

    kind: str
    eps: float
    letters: str = "D"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        count = len(self.letters.split())
        axis, shape = tuple(range(-count, 0)), x.shape[-count:]
        is_zero_centered = self.kind == "rmsnorm_zero_centered"
        init = nn.initializers.zeros if is_zero_centered else nn.initializers.ones
        scale = self.param("scale", axes.with_axes(init, self.letters), shape)
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y -= y.mean(axis, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(axis, keepdims=True) + self.eps)

        # As in transformers: Gemma scales in float32, Llama after the cast to the input's dtype.
        if is_zero_centered:
            return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        y = y.astype(x.dtype) * scale
        if self.kind == "layernorm":
            zeros = axes.with_axes(nn.initializers.zeros, self.letters)
            y += self.param("bias", zeros, shape)
        return y


class Mlp(nn.Module):
    """Two-layer MLP: down(act(up(x))), or gated down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    cfg: Transformer

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        cfg = self.cfg
        act = ACTIVATIONS[cfg.activation]
        up = self._dense("D F", "up")(x)
        hidden = act(self._dense("D F", "gate")(x)) * up if cfg.gated_mlp else act(up)
        hidden = axes.constrain(hidden, "B S F")
        return self._dense("F D", "down")(hidden)

    def _dense(self, letters, name):
        sizes = {"D": self.cfg.width, "F": self.cfg.mlp_width}
        shape = tuple(sizes[letter] for letter in letters.split())
        return Dense(letters, shape, bias=self.cfg.mlp_bias, name=name)


class Embed(nn.Module):
    """Embedding table: ids (B, S) -> (B, S, D); `attend` is the tied output head, as in Flax.

    Raises:
      ConfigError: an id is outside the table. Under `jax.jit` ids cannot be checked, and the
        embedding of such an id is NaN.
    """

    num: int
    width: int
    letters: str = "V D"

    def setup(self):
        init = axes.with_axes(embedding_init, self.letters, is_table=True)
        self.table = self.param("table", init, (self.num, self.width))

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        check_ids(ids, self.num, axes.ALPHABET[self.letters.split()[0]].meaning)
        return axes.embedding_lookup(self.table, ids, self.letters)

    def attend(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Logits: the dot product of every hidden state with every embedding."""
        return matmul(x, self.table.T)


def check_ids(ids, rows: int, table: str) -> None:
    """Raises ConfigError for ids outside 0 .. rows - 1; skipped if their values are not at hand.

    Args:
      ids: any shape. Traced ids, and ids that other processes hold in part, are not checked.
      rows: length of the table.
      table: its name in the message.
    """
    if isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True):
        return
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= rows)]
    if outside.size:
        raise ConfigError(f"id {outside[0]} is outside the table of {rows} rows ({table}).")
