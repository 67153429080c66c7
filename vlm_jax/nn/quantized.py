"""Frozen kernels in 8 or 4 bits, as in QLoRA (Dettmers et al. 2023, section 3).

A kernel is dequantized where it is multiplied, one layer at a time, and again in the backward pass.
The scales are not quantized a second time. A format is one row of `FORMATS`.

Not qwix 0.1.8: it casts the scales to the dtype of the products, keeps nf4 codes as uint4, which
Orbax cannot save, and replaces products by its own instead of the custom VJPs of `Dense`. Nor int4
of JAX 0.10, whose arrays on a CPU have layouts that a compiled program may not accept.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from vlm_jax.config import ConfigError

INT8_MAX = 127
# The levels of NF4 (appendix E): quantiles of a normal distribution, scaled to end at -1 and 1.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCK = 64  # weights that share a scale


class Quantized(struct.PyTreeNode):
    """A kernel as codes and scales, in the parameters of `Dense`.

    Its shape, size and dtype are of the dequantized kernel.
    """

    # Arrays, or their shapes or shardings.
    codes: Any  # integers in the shape of the kernel, but for `packed_axis`
    scale: Any  # float32: largest absolute value of each block; its sizes divide the kernel's
    #: float32, (L, 1, ...) or (1, ...): root mean square of the errors, relative to the kernel's
    error: Any
    dtype: jnp.dtype = struct.field(pytree_node=False)
    #: axis of the blocks, counted from the end; a byte has the codes of two weights of a block, one
    #: of its first half and one of its second half. None: each weight has a byte
    packed_axis: int | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.codes.shape)
        if self.packed_axis is not None:
            sizes[self.packed_axis] *= 2
        return tuple(sizes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """Its row of `FORMATS`."""
        return next(kind for kind, row in FORMATS.items() if row.dtype == self.codes.dtype)

    def astype(self, dtype) -> "Quantized":
        """Returns the same codes, which are dequantized to another dtype."""
        return self.replace(dtype=jnp.dtype(dtype))

    def dequantize(self) -> jax.Array:
        """Returns the kernel, computed in float32 and rounded to its dtype."""
        wide = FORMATS[self.kind].dequantize(self)
        return wide.astype(self.dtype).reshape(self.shape)


def is_quantized(x) -> bool:
    return isinstance(x, Quantized)


def quantize(x: jax.Array, kind: str, contracted_axes: tuple[int, ...]) -> Quantized:
    """Quantizes a kernel, or kernels that are stacked along the first axis.

    Args:
      kind: a row of `FORMATS`.
      contracted_axes: of the kernel (`axes.Partitioned.contracted_axes`).

    Raises:
      ConfigError: the kernel has no even axis, along which nf4 could pack two codes in a byte.
    """
    is_stacked = contracted_axes[0] > 0
    num_inputs = len(contracted_axes)
    if not is_stacked:
        return _quantize(x, kind, num_inputs)
    # One layer after the other: float32 copies of all would be twice as large as the kernels.
    return jax.lax.map(lambda layer: _quantize(layer, kind, num_inputs), x)


def store_as(x: jax.Array, like, contracted_axes: tuple[int, ...]):
    """Returns a parameter in the dtype and the sharding of `like`, quantized if that is.

    Args:
      like: shape, dtype and sharding, or a `Quantized` of them.
      contracted_axes: of a kernel; (): of another parameter.
    """
    x = x.astype(like.dtype)
    if not is_quantized(like):
        return jax.device_put(x, like.sharding)
    shardings = jax.tree.map(lambda array: array.sharding, like)
    jitted = jax.jit(quantize, static_argnums=(1, 2), out_shardings=shardings)
    return jitted(x, like.kind, contracted_axes)


def _quantize(x: jax.Array, kind: str, num_inputs: int) -> Quantized:
    """Quantizes the kernel of one layer, the first axes of which are its inputs."""
    wide = x.astype(jnp.float32)
    result = FORMATS[kind].quantize(wide, num_inputs).astype(x.dtype)
    errors = result.dequantize().astype(jnp.float32) - wide
    squares = jnp.sum(jnp.square(wide), keepdims=True)
    ratio = jnp.sum(jnp.square(errors), keepdims=True) / _nonzero(squares)
    return result.replace(error=jnp.sqrt(ratio))


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)


def _quantize_int8(wide: jax.Array, num_inputs: int) -> Quantized:
    """A block is the weights of all inputs of an output."""
    scale = jnp.max(jnp.abs(wide), axis=range(num_inputs), keepdims=True)
    codes = jnp.round(wide / _nonzero(scale) * INT8_MAX).astype(jnp.int8)
    return Quantized(codes, scale, None, wide.dtype)


def _dequantize_int8(kernel: Quantized) -> jax.Array:
    return kernel.codes.astype(jnp.float32) / INT8_MAX * kernel.scale


def _quantize_nf4(wide: jax.Array, num_inputs: int) -> Quantized:
    """Blocks lie along the first axis that 64 divides, else the one with the largest divisor.

    The inputs are the first axes.
    """
    del num_inputs
    sizes = [math.gcd(size, NF4_BLOCK) for size in wide.shape]
    axis = max(range(wide.ndim), key=sizes.__getitem__)
    if sizes[axis] == 1:
        raise ConfigError(
            "train.frozen_dtype nf4 needs kernels with an even width, and one has the shape "
            f"{' x '.join(map(str, wide.shape))}: choose int8."
        )
    groups = _split_axis(wide, axis, wide.shape[axis] // sizes[axis])
    scale = jnp.max(jnp.abs(groups), axis=axis + 1)
    units = groups / _nonzero(jnp.expand_dims(scale, axis + 1))
    codes = jnp.zeros(units.shape, jnp.uint8)
    for level, following in zip(NF4[:-1], NF4[1:]):
        codes += units > (level + following) / 2
    first, second = jnp.split(codes, 2, axis=axis + 1)
    packed = _merge_axis(first | second << 4, axis)
    return Quantized(packed, scale, None, wide.dtype, packed_axis=axis - wide.ndim)


def _dequantize_nf4(kernel: Quantized) -> jax.Array:
    axis = kernel.packed_axis + kernel.codes.ndim
    codes = _split_axis(kernel.codes, axis, kernel.scale.shape[axis])
    codes = jnp.concatenate([codes & 0b1111, codes >> 4], axis=axis + 1)
    return _levels(codes) * jnp.expand_dims(kernel.scale, axis + 1)


def _levels(codes: jax.Array) -> jax.Array:
    """Returns NF4[codes], chosen bit by bit: TPUs have no fast lookup in a table."""
    # Not `where` of two constants: JAX would move them out of the loop over layers, as arrays.
    is_odd = (codes & 1).astype(jnp.float32)
    levels = [even + is_odd * (odd - even) for even, odd in zip(NF4[::2], NF4[1::2])]
    for bit in (2, 4, 8):
        is_set = (codes & bit) > 0
        levels = [jnp.where(is_set, odd, even) for even, odd in zip(levels[::2], levels[1::2])]
    return levels[0]


def _split_axis(x: jax.Array, axis: int, blocks: int) -> jax.Array:
    """Splits an axis in two: number of blocks, size of a block.

    No other axis: of more axes, XLA:TPU makes float32 copies of the kernel.
    """
    return x.reshape(*x.shape[:axis], blocks, x.shape[axis] // blocks, *x.shape[axis + 1 :])


def _merge_axis(x: jax.Array, axis: int) -> jax.Array:
    """Inverse of `_split_axis`."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


class Format(NamedTuple):
    """A row of `FORMATS`.

    Attributes:
      dtype: of the codes; rows differ in it.
      quantize: float32 kernel of a layer, number of its input axes -> the kernel without `error`.
      dequantize: quantized kernel -> float32, in any shape.
    """

    dtype: jnp.dtype
    quantize: Callable[[jax.Array, int], Quantized]
    dequantize: Callable[[Quantized], jax.Array]


# By `train.frozen_dtype`.
FORMATS = {
    "int8": Format(jnp.dtype(jnp.int8), _quantize_int8, _dequantize_int8),
    "nf4": Format(jnp.dtype(jnp.uint8), _quantize_nf4, _dequantize_nf4),
}


@jax.custom_vjp
def matmul(x: Float[Array, "... D"], kernel: Quantized) -> Float[Array, "... F"]:
    """Returns the product with the kernel as a matrix (D, F).

    The kernel gets no gradient. The backward pass keeps its codes, not the dequantized kernel.
    """
    return _product(x, kernel)


def _product(x, kernel):
    return x @ kernel.dequantize().reshape(x.shape[-1], -1)


def _matmul_forward(x, kernel):
    # Not `matmul`, whose product the policies of remat would not see.
    return _product(x, kernel), kernel


def _matmul_backward(kernel, dy):
    return dy @ kernel.dequantize().reshape(-1, dy.shape[-1]).T, None


matmul.defvjp(_matmul_forward, _matmul_backward)
