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
LOW_BITS = 0b1111
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
    #: axis, counted from the end, along which a byte has the codes of two weights of a block: one
    #: of its first half and one of its second half; None: each has a byte of its own
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
        """Returns the kernel: levels times scales in float32, rounded to its dtype."""
        blocks = self.scale.shape
        codes = self.codes.reshape(_split_axes(self.codes.shape, blocks))
        if self.packed_axis is not None:
            halves = [codes & LOW_BITS, codes >> 4]
            codes = jnp.concatenate(halves, axis=_within_block(self.packed_axis))
        scale = self.scale.reshape(_split_axes(blocks, blocks))
        levels = FORMATS[self.kind].decode(codes)
        return (levels * scale).astype(self.dtype).reshape(self.shape)


def is_quantized(x) -> bool:
    return isinstance(x, Quantized)


def quantize(x: jax.Array, kind: str, contracted_axes: tuple[int, ...]) -> Quantized:
    """Quantizes a kernel, or kernels that are stacked along the first axis.

    Args:
      kind: a row of `FORMATS`.
      contracted_axes: of the kernel (`axes.Partitioned.contracted_axes`).
    """
    first = contracted_axes[0]
    inputs = range(len(contracted_axes))
    if first == 0:
        return _quantize(x, kind, inputs)
    # One layer after the other: float32 copies of all would be twice as large as the kernels.
    return jax.lax.map(lambda layer: _quantize(layer, kind, inputs), x)


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


def _quantize(x: jax.Array, kind: str, inputs: range) -> Quantized:
    """Quantizes a kernel of one layer; `inputs` are its contracted axes."""
    row, wide = FORMATS[kind], x.astype(jnp.float32)
    blocks = row.num_blocks(x.shape, inputs)
    groups = wide.reshape(_split_axes(x.shape, blocks))
    scale = jnp.max(jnp.abs(groups), axis=range(1, groups.ndim, 2), keepdims=True)
    codes = row.encode(groups / jnp.where(scale > 0, scale, 1)).astype(row.dtype)
    packed_axis, sizes = None, list(x.shape)
    if row.is_packed:
        (axis,) = [axis for axis, count in enumerate(blocks) if count != x.shape[axis]]
        packed_axis = axis - x.ndim
        sizes[axis] //= 2
        first, second = jnp.split(codes, 2, axis=_within_block(packed_axis))
        codes = first | second << 4
    unknown = jnp.zeros((1,) * x.ndim)
    codes, scale = codes.reshape(sizes), scale.reshape(blocks)
    result = Quantized(codes, scale, unknown, x.dtype, packed_axis)
    errors = result.dequantize().astype(jnp.float32) - wide
    squares = jnp.sum(jnp.square(wide), keepdims=True)
    ratio = jnp.sum(jnp.square(errors), keepdims=True) / jnp.where(squares > 0, squares, 1)
    return result.replace(error=jnp.sqrt(ratio))


def _split_axes(shape: tuple[int, ...], blocks: tuple[int, ...]) -> list[int]:
    """Returns a shape with every axis split in two: number of blocks, size of a block."""
    sizes = []
    for size, count in zip(shape, blocks):
        sizes += [count, size // count]
    return sizes


def _within_block(axis: int) -> int:
    """Returns the axis within a block after `_split_axes`; both are counted from the end."""
    return 2 * axis + 1


def _one_block_for_all_inputs(shape: tuple[int, ...], inputs: range) -> tuple[int, ...]:
    return tuple(1 if axis in inputs else size for axis, size in enumerate(shape))


def _blocks_of_64(shape: tuple[int, ...], inputs: range) -> tuple[int, ...]:
    """Blocks along the first axis that 64 divides, else along the one with the largest divisor.

    Raises:
      ConfigError: no axis is even.
    """
    del inputs  # they are the first axes
    sizes = [math.gcd(size, NF4_BLOCK) for size in shape]
    longest = max(range(len(shape)), key=sizes.__getitem__)
    if sizes[longest] == 1:
        raise ConfigError(
            f"train.frozen_dtype nf4 needs kernels with an even width, and one has the shape "
            f"{' x '.join(map(str, shape))}: choose int8."
        )
    return tuple(
        size // sizes[axis] if axis == longest else size for axis, size in enumerate(shape)
    )


def _encode_int8(units: jax.Array) -> jax.Array:
    return jnp.round(units * INT8_MAX)


def _decode_int8(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) / INT8_MAX


def _encode_nf4(units: jax.Array) -> jax.Array:
    """Returns the indices of the nearest levels."""
    codes = jnp.zeros(units.shape, jnp.int32)
    for level, following in zip(NF4[:-1], NF4[1:]):
        codes += units > (level + following) / 2
    return codes


def _decode_nf4(codes: jax.Array) -> jax.Array:
    """Returns the levels, chosen bit by bit: TPUs have no fast lookup in a table."""
    # Not `where` of two constants: JAX would move them out of the loop over layers, as arrays.
    is_odd = (codes & 1).astype(jnp.float32)
    levels = [even + is_odd * (odd - even) for even, odd in zip(NF4[::2], NF4[1::2])]
    for bit in (2, 4, 8):
        is_set = (codes & bit) > 0
        levels = [jnp.where(is_set, odd, even) for even, odd in zip(levels[::2], levels[1::2])]
    return levels[0]


class Format(NamedTuple):
    """A row of `FORMATS`.

    Attributes:
      dtype: of the codes, another one in every row.
      is_packed: a byte has two codes.
      num_blocks: shape of a kernel and its input axes -> blocks, which share a scale, on each axis.
      encode: weights between -1 and 1 -> codes.
      decode: codes -> float32 levels between -1 and 1.
    """

    dtype: jnp.dtype
    is_packed: bool
    num_blocks: Callable[[tuple[int, ...], range], tuple[int, ...]]
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


# By `train.frozen_dtype`.
FORMATS = {
    "int8": Format(
        jnp.dtype(jnp.int8), False, _one_block_for_all_inputs, _encode_int8, _decode_int8
    ),
    "nf4": Format(jnp.dtype(jnp.uint8), True, _blocks_of_64, _encode_nf4, _decode_nf4),
}


@jax.custom_vjp
def matmul(x: Float[Array, "... D"], kernel: Quantized) -> Float[Array, "... F"]:
    """Returns the product with the kernel as a matrix (D, F).

    The kernel gets no gradient. The backward pass keeps its codes, not the dequantized kernel.
    """
    return x @ kernel.dequantize().reshape(x.shape[-1], -1)


def _matmul_forward(x, kernel):
    return matmul(x, kernel), kernel


def _matmul_backward(kernel, dy):
    return dy @ kernel.dequantize().reshape(-1, dy.shape[-1]).T, None


matmul.defvjp(_matmul_forward, _matmul_backward)
