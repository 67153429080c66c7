"""Every kernel gives what `dot_product_attention` gives, gradients included, and stands where it serves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import axes
from vlm_jax.config import Mesh
from vlm_jax.nn import kernels
from vlm_jax.nn.attention import dot_product_attention

CASES = {  # queries, keys, heads, key heads, cap, kind of mask
    "grouped": (256, 384, 4, 2, 5.0, "random"),
    "odd": (130, 257, 2, 2, 0.0, "keys"),
}


def case(length, keys, heads, kv_heads, cap, kind, rows=2, width=64):
    r = jax.random.split(jax.random.key(0), 5)
    q, dy = (jax.random.normal(key, (rows, length, heads, width)) for key in r[:2])
    k, v = (jax.random.normal(key, (rows, kv_heads, keys, width)) for key in r[2:4])
    size = {"random": (rows, 1, length, keys), "keys": (rows, 1, 1, keys)}.get(kind)
    mask = jax.random.bernoulli(r[4], 0.5, size) if size else None
    if kind == "random":  # blocks that are empty, and queries that see nothing
        mask = (
            mask.at[0, :, :, 128:].set(False).at[1, :, :, :128].set(False).at[:, :, :5].set(False)
        )
        dy *= mask.any(-1).swapaxes(1, 2)[..., None]
    return (q, k, v, mask), dy, cap


def value_and_gradients(function, arrays, dy):
    q, k, v, mask = arrays

    def total(q, k, v):
        return jnp.sum(jnp.where(dy == 0, 0, function(q, k, v, mask) * dy))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)


def assert_same(function, plain, arrays, dy):
    expected = value_and_gradients(plain, arrays, dy)
    for found, value in zip(
        jax.tree.leaves(value_and_gradients(function, arrays, dy)), jax.tree.leaves(expected)
    ):
        np.testing.assert_allclose(found, value, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_for_tpus_is_attend(name):
    arrays, dy, cap = case(*CASES[name])
    assert_same(
        lambda *x: kernels.splash_attention(*x, 0.1, cap, interpret=True),
        lambda *x: dot_product_attention(*x, scale=0.1, cap=cap),
        arrays,
        dy,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("on", ["tpu", "gpu"])
def test_in_bfloat16_a_kernel_is_as_near_to_float32_as_attend(on, name):
    arrays, dy, cap = case(*CASES[name])
    cap = 0.0 if on == "gpu" else cap
    narrow = [x if x is None or x.dtype == bool else x.astype(jnp.bfloat16) for x in arrays]
    kernel, settings = {
        "tpu": (kernels.splash_attention, {"interpret": True}),
        "gpu": (kernels.cudnn_attention, {"implementation": "xla"}),
    }[on]

    def plain(*x):
        return dot_product_attention(*x, scale=0.1, cap=cap)

    exact = value_and_gradients(plain, arrays, dy)[1]
    found = value_and_gradients(lambda *x: kernel(*x, 0.1, cap, **settings), narrow, dy)[1]
    for wide, ours, theirs in zip(exact, found, value_and_gradients(plain, narrow, dy)[1]):
        assert ours.dtype == jnp.bfloat16
        assert error(ours, wide) < 1.5 * error(theirs, wide) + 1e-3


def error(x, exact):
    return float(jnp.linalg.norm(x.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize("name", CASES)
def test_what_cudnn_is_asked_for_is_attend(name):
    arrays, dy, _ = case(*CASES[name])
    assert_same(
        lambda *x: kernels.cudnn_attention(*x, 0.1, implementation="xla"),
        lambda *x: dot_product_attention(*x, scale=0.1),
        arrays,
        dy,
    )


def test_the_kernel_for_tpus_on_a_mesh_is_attend():
    arrays, dy, _ = case(128, 128, 4, 2, 0.0, "random", rows=4)
    with jax.set_mesh(axes.make_mesh(Mesh(1, 4, 2))):
        assert_same(
            lambda *x: kernels.splash_attention(*x, 0.1, interpret=True),
            lambda *x: dot_product_attention(*x, scale=0.1),
            arrays,
            dy,
        )


@pytest.mark.parametrize(
    "platform, length, dtype, width, cap, kernel",
    [
        ("cpu", 512, "bfloat16", 64, 0.0, None),
        ("tpu", 512, "float32", 72, 30.0, kernels.splash_attention),
        ("tpu", 64, "bfloat16", 64, 0.0, None),
        ("gpu", 64, "bfloat16", 64, 0.0, kernels.cudnn_attention),
        ("gpu", 512, "float32", 64, 0.0, None),
        ("gpu", 512, "bfloat16", 256, 0.0, None),
        ("gpu", 512, "bfloat16", 64, 30.0, None),
        ("gpu", 577, "bfloat16", 64, 0.0, None),
    ],
)
def test_the_platform_chooses(monkeypatch, platform, length, dtype, width, cap, kernel):
    monkeypatch.setattr(axes, "platform", lambda: platform)
    q, k = jnp.zeros((1, length, 2, width), dtype), jnp.zeros((1, 2, length, width), dtype)
    assert kernels.kernel_for(q, k, jnp.ones((1, 1, 1, length), bool), cap) is kernel
