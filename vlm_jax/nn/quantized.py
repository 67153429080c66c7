"""Frozen kernels in 8 or 4 bits, as in QLoRA (Dettmers et al. 2023, section 3).

A kernel is dequantized where it is multiplied, one layer at a time, and again in the backward pass.
A format is one row of `FORMATS`.

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
SCALE_BLOCK = 256  # largest number of scales that share a scale of their own
SCALE_CODES = 255


class QuantizedScales(struct.PyTreeNode):
    """Scales of blocks in 8 bits: a share of the largest scale of their own block.

    The code is of the square root of the share, so that small scales have small errors. QLoRA in
    bitsandbytes codes the difference to the mean, which can make a small scale 0 or negative.
    """

    codes: Any  # uint8, 1 to 255, in the shape of the scales
    largest: Any  # float32; its sizes divide the codes'

    def dequantize(self) -> jax.Array:
        """Returns the scales, in float32."""
        largest = self.largest
        for axis, size in enumerate(self.codes.shape):
            largest = jnp.repeat(largest, size // largest.shape[axis], axis)
        scales = jnp.square(self.codes.astype(jnp.float32) / SCALE_CODES) * largest
        # Computed once: within the product with the levels, each scale would be computed 64 times.
        return jax.lax.optimization_barrier(scales)


class Quantized(struct.PyTreeNode):
    """A kernel as codes and scales, in the parameters of `Dense`.

    Its shape, size and dtype are of the dequantized kernel.
    """

    # Arrays, or their shapes or shardings.
    codes: Any  # integers in the shape of the kernel, but for `packed_axis`
    #: float32: largest absolute value of each block; its sizes divide the kernel's. Or
    #: `QuantizedScales` of these
    scale: Any
    #: float32, (L, 1, ...) or (1, ...): root mean square of the errors, relative to the kernel's
    error: Any
    dtype: jnp.dtype = struct.field(pytree_node=False)
    #: axis of the blocks, counted from the end; a byte has the codes of two weights of a block, one
    #: of its first half and one of its second half. None: each weight has a byte
    packed_axis: int | None = struct.field(pytree_node=False, default=None)
    kind: str = struct.field(pytree_node=False, default="")  # row of `FORMATS`

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
    def largest(self) -> jax.Array:
        """Largest absolute value of each block, or of all blocks that share a scale's scale."""
        return self.scale.largest if isinstance(self.scale, QuantizedScales) else self.scale

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
    result = FORMATS[kind].quantize(wide, num_inputs).replace(dtype=x.dtype, kind=kind)
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
    """Quantizes with scales in 8 bits.

    The levels are chosen for the scales in 8 bits, so that their rounding adds almost no error.
    """
    del num_inputs
    groups, axis = _blocks(wide)
    scales = _quantize_scales(_largest(groups, axis))
    return _nf4(wide, groups, axis, scales.dequantize()).replace(scale=scales)


def _quantize_nf4_single(wide: jax.Array, num_inputs: int) -> Quantized:
    """Quantizes with scales in float32."""
    del num_inputs
    groups, axis = _blocks(wide)
    return _nf4(wide, groups, axis, _largest(groups, axis))


def _blocks(wide: jax.Array) -> tuple[jax.Array, int]:
    """Returns the kernel with the axis of the blocks split in two, and the first of these axes.

    The axis is the first that 64 divides, else the one with the largest divisor. The inputs are the
    first axes.
    """
    sizes = [math.gcd(size, NF4_BLOCK) for size in wide.shape]
    axis = max(range(wide.ndim), key=sizes.__getitem__)
    if sizes[axis] == 1:
        raise ConfigError(
            "train.frozen_dtype nf4 needs kernels with an even width, and one has the shape "
            f"{' x '.join(map(str, wide.shape))}: choose int8."
        )
    return _split_axis(wide, axis, wide.shape[axis] // sizes[axis]), axis


def _largest(groups: jax.Array, axis: int) -> jax.Array:
    """Returns the largest absolute value of each block."""
    return jnp.max(jnp.abs(groups), axis=axis + 1)


def _nf4(wide: jax.Array, groups: jax.Array, axis: int, scale: jax.Array) -> Quantized:
    """Returns the kernel with the level nearest to each weight of the blocks (`_blocks`)."""
    units = groups / _nonzero(jnp.expand_dims(scale, axis + 1))
    codes = jnp.zeros(units.shape, jnp.uint8)
    for level, following in zip(NF4[:-1], NF4[1:]):
        codes += units > (level + following) / 2
    first, second = jnp.split(codes, 2, axis=axis + 1)
    packed = _merge_axis(first | second << 4, axis)
    return Quantized(packed, scale, None, wide.dtype, packed_axis=axis - wide.ndim)


def _quantize_scales(scale: jax.Array) -> QuantizedScales:
    """Blocks lie along the first axis with the largest divisor up to 256."""
    sizes = [_largest_divisor(size) for size in scale.shape]
    axis = max(range(scale.ndim), key=sizes.__getitem__)
    blocks = scale.shape[axis] // sizes[axis]
    largest = jnp.max(_split_axis(scale, axis, blocks), axis=axis + 1)
    shares = scale / _nonzero(jnp.repeat(largest, sizes[axis], axis))
    # A code of 0 would drop all weights of a block.
    codes = jnp.clip(jnp.round(jnp.sqrt(shares) * SCALE_CODES), 1, SCALE_CODES)
    return QuantizedScales(codes.astype(jnp.uint8), largest)


def _largest_divisor(size: int) -> int:
    return next(n for n in range(min(size, SCALE_BLOCK), 0, -1) if size % n == 0)


def _dequantize_nf4(kernel: Quantized) -> jax.Array:
    axis = kernel.packed_axis + kernel.codes.ndim
    scale = kernel.scale
    if isinstance(scale, QuantizedScales):
        scale = scale.dequantize()
    codes = _split_axis(kernel.codes, axis, scale.shape[axis])
    codes = jnp.concatenate([codes & 0b1111, codes >> 4], axis=axis + 1)
    return _levels(codes) * jnp.expand_dims(scale, axis + 1)


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
      quantize: float32 kernel of a layer, number of its input axes -> the kernel without `error`.
      dequantize: quantized kernel -> float32, in any shape.
    """

    quantize: Callable[[jax.Array, int], Quantized]
    dequantize: Callable[[Quantized], jax.Array]


# By `Train.frozen_format`.
FORMATS = {
    "int8": Format(_quantize_int8, _dequantize_int8),
    "nf4": Format(_quantize_nf4, _dequantize_nf4),
    "nf4_single": Format(_quantize_nf4_single, _dequantize_nf4),
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
