"""Layers against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from jax.scipy.special import erf

from vlm_jax.config import Transformer
from vlm_jax.nn import layers

RNG = np.random.default_rng(0)


def random(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x):
    return module.apply({"params": params}, x)


def shapes(module, x):
    boxed = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    boxes, _ = jax.tree_util.tree_flatten_with_path(
        boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
    )
    return {jax.tree_util.keystr(path): (box.letters, box.value.shape) for path, box in boxes}


@pytest.mark.parametrize("leading, outputs", [((), 5), ((3,), 5), ((2, 3), 5), ((2, 3), 3)])
def test_matmul_has_the_value_and_gradients_of_a_plain_product(leading, outputs):
    x, w, dy = random(*leading, 4), random(4, outputs), random(*leading, outputs)
    expected, plain = jax.vjp(lambda x, w: x @ w, x, w)
    actual, custom = jax.vjp(layers.matmul, x, w)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for gradient, expected_gradient in zip(custom(dy), plain(dy)):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_matmul_in_bfloat16_has_gradients_in_bfloat16():
    x, w = random(3, 4).astype(jnp.bfloat16), random(4, 5).astype(jnp.bfloat16)
    gradients = jax.grad(
        lambda x, w: layers.matmul(x, w).sum().astype(jnp.float32), argnums=(0, 1)
    )(x, w)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("bias", [True, False])
def test_dense_splits_the_width_into_heads(bias):
    dense = layers.Dense("D N H", (6, 2, 3), bias=bias)
    x, params = random(2, 5, 6), {"kernel": random(6, 2, 3)}
    if bias:
        params["bias"] = random(2, 3)
    expected = jnp.einsum("bsd,dnh->bsnh", x, params["kernel"]) + params.get("bias", 0)
    np.testing.assert_allclose(run(dense, params, x), expected, rtol=1e-5, atol=1e-5)


def test_dense_merges_heads_into_the_width():
    dense = layers.Dense("N H D", (2, 3, 6), contract=2)
    x, params = random(2, 5, 2, 3), {"kernel": random(2, 3, 6), "bias": random(6)}
    expected = jnp.einsum("bsnh,nhd->bsd", x, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(run(dense, params, x), expected, rtol=1e-5, atol=1e-5)


def test_parameters_of_dense_carry_their_logical_axes():
    split, merge = layers.Dense("D N H", (6, 2, 3)), layers.Dense("N H D", (2, 3, 6), contract=2)
    assert shapes(split, random(1, 6)) == {
        "['kernel']": ("D N H", (6, 2, 3)),
        "['bias']": ("N H", (2, 3)),
    }
    assert shapes(merge, random(1, 2, 3)) == {
        "['kernel']": ("N H D", (2, 3, 6)),
        "['bias']": ("D", (6,)),
    }


@pytest.mark.parametrize(
    "letters, contract, shape", [("D N H", 1, (64, 4, 16)), ("N H D", 2, (4, 16, 64))]
)
def test_a_new_dense_keeps_the_variance_of_its_input(letters, contract, shape):
    dense = layers.Dense(letters, shape, contract=contract, bias=False)
    x = random(512, *shape[:contract])
    y = dense.apply(meta.unbox(dense.init(jax.random.key(0), x)), x)
    np.testing.assert_allclose(y.std(), 1, atol=0.1)


def test_layernorm_is_its_formula():
    x, scale, bias = 3 * random(4, 8) + 2, random(8), random(8)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    expected = (x - mean) / jnp.sqrt(variance + 0.1) * scale + bias
    actual = run(layers.Norm("layernorm", 0.1), {"scale": scale, "bias": bias}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_rmsnorm_is_its_formula():
    x, scale = 3 * random(4, 8) + 2, random(8)
    expected = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(
        run(layers.Norm("rmsnorm", 0.1), {"scale": scale}, x), expected, rtol=1e-4, atol=1e-5
    )


def test_rmsnorm_has_no_bias():
    assert set(shapes(layers.Norm("rmsnorm", 1e-6), random(1, 8))) == {"['scale']"}


def test_norms_of_bfloat16_are_computed_in_float32():
    """bfloat16's 8 bits lose deviations of 1 from a mean of 1000 if squares are summed in it."""
    x = (1000 + 8 * jnp.arange(8.0)).astype(jnp.bfloat16)
    params = {"scale": jnp.ones(8, jnp.bfloat16), "bias": jnp.zeros(8, jnp.bfloat16)}
    y = run(layers.Norm("layernorm", 1e-6), params, x)
    wide = x.astype(jnp.float32)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), (wide - wide.mean()) / wide.std(), atol=0.01)


FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_an_activation_is_its_formula(name):
    x = jnp.linspace(-4, 4, 33)
    np.testing.assert_allclose(
        layers.ACTIVATIONS[name](x), FORMULAS[name](np.asarray(x)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_up_activation_down(gated, bias):
    cfg = Transformer(width=4, mlp_width=6, activation="silu", gated_mlp=gated, mlp_bias=bias)
    names = ("up", "gate", "down") if gated else ("up", "down")
    params = {name: {"kernel": random(6, 4) if name == "down" else random(4, 6)} for name in names}
    if bias:
        params = {
            name: {**params[name], "bias": random(params[name]["kernel"].shape[1])}
            for name in names
        }

    def product(name, x):
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    x = random(2, 3, 4)
    up = product("up", x)
    expected = product("down", jax.nn.silu(product("gate", x)) * up if gated else jax.nn.silu(up))
    np.testing.assert_allclose(run(layers.Mlp(cfg), params, x), expected, rtol=1e-4, atol=1e-4)


def test_the_tied_head_multiplies_with_the_embedding():
    embed, table = layers.Embed(7, 4), random(7, 4)
    ids, x = jnp.asarray([[3, 0, 6]]), random(1, 3, 4)
    np.testing.assert_array_equal(embed.apply({"params": {"table": table}}, ids), table[ids])
    logits = embed.apply({"params": {"table": table}}, x, method="attend")
    np.testing.assert_allclose(logits, x @ table.T, rtol=1e-5, atol=1e-5)
