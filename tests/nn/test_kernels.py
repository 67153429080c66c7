"""Fused kernels equal `dot_product_attention`, gradients included, and are used if they fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import axes
from vlm_jax.config import Mesh
from vlm_jax.nn import kernels
from vlm_jax.nn.attention import dot_product_attention

SCALE = 0.1
CASES = {  # queries, keys, heads, key heads, cap, kind of mask
    "grouped": (256, 384, 4, 2, 5.0, "random"),
    "odd": (130, 257, 2, 2, None, "keys"),
}
every_case = pytest.mark.parametrize("name", CASES)


def plain(q, k, v, mask, cap):
    return dot_product_attention(q, k, v, mask, SCALE, cap)


def splash(q, k, v, mask, cap):
    return kernels.splash_attention(q, k, v, mask, SCALE, cap, interpret=True)


def cudnn(q, k, v, mask, cap):
    return kernels.cudnn_attention(q, k, v, mask, SCALE, cap, implementation="xla")


def inputs(length, keys, heads, kv_heads, kind, rows=2, width=64):
    """Queries, keys, values, mask, and the gradient of the output."""
    rng = np.random.default_rng(0)
    q, dy = rng.normal(size=(2, rows, length, heads, width)).astype(np.float32)
    k, v = rng.normal(size=(2, rows, kv_heads, keys, width)).astype(np.float32)
    mask = rng.random((rows, 1, 1 if kind == "keys" else length, keys)) < 0.5
    if kind == "random":
        # Blocks that are empty, and queries that see nothing.
        mask[0, :, :, 128:] = False
        mask[1, :, :, :128] = False
        mask[:, :, :5] = False
        dy *= mask.any(-1).swapaxes(1, 2)[..., None]
    return q, k, v, mask, dy


def case(name):
    """The inputs and the cap of a case."""
    *sizes, cap, kind = CASES[name]
    return inputs(*sizes, kind), cap


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(function, cap, q, k, v, mask, dy):
    def loss(q, k, v):
        return jnp.sum(jnp.where(dy == 0, 0, function(q, k, v, mask, cap) * dy))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)


def assert_equals_plain(function, arrays, cap):
    actual = value_and_gradients(function, cap, *arrays)
    expected = value_and_gradients(plain, cap, *arrays)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)


@every_case
def test_splash_attention_is_attention(name):
    arrays, cap = case(name)
    assert_equals_plain(splash, arrays, cap)


@every_case
def test_cudnn_attention_is_attention(name):
    arrays, _ = case(name)
    assert_equals_plain(cudnn, arrays, None)


@every_case
@pytest.mark.parametrize("kernel", [splash, cudnn])
def test_in_bfloat16_a_kernel_is_as_near_to_float32_as_attention(kernel, name):
    arrays, cap = case(name)
    cap = None if kernel is cudnn else cap
    *qkv, mask, dy = arrays
    narrow = [x.astype(jnp.bfloat16) for x in qkv]
    _, exact = value_and_gradients(plain, cap, *arrays)
    _, by_kernel = value_and_gradients(kernel, cap, *narrow, mask, dy)
    _, by_plain = value_and_gradients(plain, cap, *narrow, mask, dy)
    for expected, a, b in zip(exact, by_kernel, by_plain):
        assert a.dtype == jnp.bfloat16
        assert error(a, expected) < 1.5 * error(b, expected) + 1e-3


def error(x, exact):
    return np.linalg.norm(np.float32(x) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("length, heads, kv_heads, cap", [(384, 4, 2, 5.0), (130, 2, 2, None)])
def test_splash_attention_by_segments_is_attention(length, heads, kv_heads, cap):
    q, k, v, mask, dy, segments = packed_inputs(length, heads, kv_heads)
    assert_equals_plain(splash_by_segments(segments), (q, k, v, mask, dy), cap)


def packed_inputs(length, heads, kv_heads, rows=2):
    """Inputs of rows with three segments and padding, their causal mask, and the segment ids."""
    q, k, v, _, dy = inputs(length, length, heads, kv_heads, "keys", rows)
    ends = np.array([[40, 100, 128], [1, 60, length]] * (rows // 2))
    slots = np.arange(length)
    segments = (slots < ends[:, 2:]) * (1 + (slots[None, None] >= ends[:, :2, None]).sum(1))
    same = segments[:, :, None] == segments[:, None]
    mask = same & (slots[:, None] >= slots) & (segments > 0)[:, None]
    dy *= (segments > 0)[:, :, None, None]
    return q, k, v, mask[:, None], dy, segments.astype(np.int32)


def splash_by_segments(segments):
    """Splash attention that has the segments instead of the mask."""

    def attend(q, k, v, mask, cap):
        del mask
        return kernels.splash_attention(q, k, v, None, SCALE, cap, segments, interpret=True)

    return attend


def test_splash_attention_by_segments_on_a_mesh_is_attention():
    q, k, v, mask, dy, segments = packed_inputs(130, 4, 2, rows=4)
    with jax.set_mesh(axes.make_mesh(Mesh(1, 4, 2))):
        assert_equals_plain(splash_by_segments(segments), (q, k, v, mask, dy), None)


def test_splash_attention_on_a_mesh_is_attention():
    arrays = inputs(128, 128, 4, 2, "random", rows=4)
    with jax.set_mesh(axes.make_mesh(Mesh(1, 4, 2))):
        assert_equals_plain(splash, arrays, None)


@pytest.mark.parametrize(
    "platform, length, dtype, width, cap, kernel",
    [
        ("cpu", 512, "bfloat16", 64, None, None),
        ("tpu", 512, "float32", 72, 30.0, kernels.splash_attention),
        ("tpu", 64, "bfloat16", 64, None, None),
        ("gpu", 64, "bfloat16", 64, None, kernels.cudnn_attention),
        ("gpu", 512, "float32", 64, None, None),
        ("gpu", 512, "bfloat16", 256, None, None),
        ("gpu", 512, "bfloat16", 64, 30.0, None),
        ("gpu", 577, "bfloat16", 64, None, None),
    ],
)
def test_the_platform_chooses_the_kernel(monkeypatch, platform, length, dtype, width, cap, kernel):
    monkeypatch.setattr(axes, "platform", lambda: platform)
    q, k = jnp.zeros((1, length, 2, width), dtype), jnp.zeros((1, 2, length, width), dtype)
    assert kernels.kernel_for(q, k, cap) is kernel
