"""Kernels in 8 and 4 bits: levels, rounding errors, and products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from vlm_jax.nn.quantized import NF4, is_quantized, matmul, quantize

# Largest rounding error, relative to the largest weight of a block.
MAX_ERROR = {"int8": 0.5 / 127, "nf4": (1 - 0.6961928) / 2, "nf4_single": (1 - 0.6961928) / 2}
INPUTS, OUTPUTS = 128, 6


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_trip(kernel, kind, contracted_axes):
    quantized = quantize(kernel, kind, contracted_axes)
    return quantized, quantized.dequantize()


def test_the_levels_are_quantiles_of_a_normal_distribution():
    """As the authors compute them: 8 positive and 7 negative quantiles, 0, and the scale."""
    outermost = 0.9677083
    positive = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0], negative])) / positive.max()
    np.testing.assert_allclose(NF4, levels, atol=1e-6)


@pytest.mark.parametrize("kind", MAX_ERROR)
def test_errors_are_at_most_half_a_step_of_their_block(kind):
    """Two stacked layers, one of them with weights that are 1,000 times as large.

    A block of 8-bit scales holds the 6 outputs of a layer.
    """
    kernel = np.random.default_rng(0).normal(size=(2, INPUTS, OUTPUTS)).astype(np.float32)
    kernel[1] *= 1000
    kernel[0, :, 2] = 0
    quantized, result = round_trip(kernel, kind, (1,))
    assert quantized.shape == kernel.shape
    assert quantized.codes.nbytes == kernel.size / (1 if kind == "int8" else 2)

    blocks = kernel.reshape(2, 1 if kind == "int8" else 2, -1, OUTPUTS)
    largest = np.abs(blocks).max(2, keepdims=True)
    if kind == "nf4":
        scale = np.asarray(quantized.scale.dequantize())[:, :, None]
        # Half a step of the square root, whose square has twice its error.
        assert (np.abs(scale - largest) <= largest.max(-1, keepdims=True) / 255)[largest > 0].all()
        largest = np.where(largest > 0, scale, 0)
    errors = np.asarray(result).reshape(blocks.shape) - blocks
    assert (np.abs(errors) <= largest * MAX_ERROR[kind] + 1e-6).all()
    np.testing.assert_array_equal(result[0, :, 2], 0)
    relative = np.linalg.norm(result - kernel, axis=(1, 2)) / np.linalg.norm(kernel, axis=(1, 2))
    np.testing.assert_allclose(quantized.error[:, 0, 0], relative, rtol=1e-4)
    if kind != "int8":
        nearest = np.abs((blocks / np.maximum(largest, 1e-9))[..., None] - NF4).argmin(-1)
        first, second = np.split(nearest, 2, axis=2)
        codes = np.asarray(quantized.codes).reshape(first.shape)
        np.testing.assert_array_equal(codes, first + 16 * second)


def test_scales_in_8_bits_take_little_and_add_almost_no_error():
    """Outputs with weights of other sizes, of which a block of scales has 256."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=256)).astype(np.float32)
    kernel = rng.normal(size=(INPUTS, 256)).astype(np.float32) * sizes
    double, single = (round_trip(kernel, kind, (0,))[0] for kind in ("nf4", "nf4_single"))
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves((double.codes, double.scale))) / kernel.size
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)
    np.testing.assert_allclose(double.error, single.error, rtol=0.002)
    # Of an output with small weights, too.
    small = np.argsort(sizes)[:20]
    errors = np.linalg.norm(double.dequantize() - kernel, axis=0) / np.linalg.norm(kernel, axis=0)
    assert errors[small].mean() < 0.11
    assert double.largest.max() == np.abs(kernel).max()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_product_and_its_gradient_are_of_the_dequantized_kernel(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, INPUTS)).astype(np.float32)
    kernel = rng.normal(size=(8, INPUTS // 8, OUTPUTS)).astype(np.float32)
    quantized, dequantized = round_trip(kernel, kind, (0, 1))

    @jax.jit
    def product_and_gradient(x, kernel):
        def product(x):
            if is_quantized(kernel):
                return matmul(x, kernel)
            return x @ kernel.reshape(INPUTS, OUTPUTS)

        return product(x), jax.grad(lambda x: jnp.sum(jnp.sin(product(x))))(x)

    actual = product_and_gradient(x, quantized)
    for a, b in zip(actual, product_and_gradient(x, dequantized)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_remat_that_saves_products_saves_those_of_quantized_kernels():
    kernel = quantize(jnp.ones((64, 64)), "int8", contracted_axes=(0,))

    def loss(x):
        hidden = jnp.sin(matmul(x, kernel))
        return matmul(hidden, kernel).sum()

    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    program = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(jnp.ones((2, 64)))
    # Two in the forward pass and two in the backward pass.
    assert str(program).count("dot_general") == 4
