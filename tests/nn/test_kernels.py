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
from vlm_jax.structs import SegmentPattern

SCALE = 0.1
CASES = {  # queries, keys, heads, key heads, cap, kind of mask
    "grouped": (256, 384, 4, 2, 5.0, "random"),
    "odd": (130, 257, 2, 2, None, "keys"),
}
every_case = pytest.mark.parametrize("name", CASES)


def plain(q, k, v, mask, cap):
    return dot_product_attention(q, k, v, mask, SCALE, cap)


def splash(q, k, v, mask, cap):
    return kernels.splash_attention(q, k, v, SCALE, cap, mask, interpret=True)


def cudnn(q, k, v, mask, cap):
    """The structure that cuDNN gets, by XLA."""
    return kernels.cudnn_attention(q, k, v, SCALE, cap, mask, implementation="xla")


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


def packed_inputs(length, heads, kv_heads, rows=2, causal=True):
    """Inputs of rows with three segments and padding, their mask, and the segment ids."""
    q, k, v, _, dy = inputs(length, length, heads, kv_heads, "keys", rows)
    ends = np.array([[40, 100, 128], [1, 60, length]] * (rows // 2))
    slots = np.arange(length)
    segments = (slots < ends[:, 2:]) * (1 + (slots[None, None] >= ends[:, :2, None]).sum(1))
    same = segments[:, :, None] == segments[:, None]
    mask = same & (segments > 0)[:, None]
    if causal:
        mask &= slots[:, None] >= slots
    dy *= (segments > 0)[:, :, None, None]
    return q, k, v, mask[:, None], dy, segments.astype(np.int32)


def without_mask(kernel, form, pattern=None, **options):
    """Attention by a kernel that gets the pattern in another form than the mask."""
    choice = kernels.Kernel(functools.partial(kernel, **options), form)

    def attend(q, k, v, mask, cap):
        del mask
        return kernels.fused_attention(choice, q, k, v, None, SCALE, cap, pattern)

    return attend


INTERPRETED = {"interpret": True}
BY_XLA = {"implementation": "xla"}
WINDOW = 16


@pytest.mark.parametrize(
    "kernel, length, heads, kv_heads, cap, causal",
    [
        (kernels.splash_attention, 384, 4, 2, 5.0, True),
        (kernels.splash_attention, 130, 2, 2, None, True),
        (kernels.splash_attention, 130, 2, 2, None, False),
        (kernels.pallas_attention, 130, 4, 2, None, True),
        (kernels.pallas_attention, 130, 2, 2, None, False),
    ],
)
def test_a_kernel_by_segments_is_attention(kernel, length, heads, kv_heads, cap, causal):
    *arrays, segments = packed_inputs(length, heads, kv_heads, causal=causal)
    pattern = SegmentPattern(segments, causal=causal)
    attend = without_mask(kernel, "segments", pattern, **INTERPRETED)
    assert_equals_plain(attend, arrays, cap)


@pytest.mark.parametrize(
    "kernel, options, has_window",
    [
        (kernels.splash_attention, INTERPRETED, True),
        (kernels.cudnn_attention, BY_XLA, True),
        (kernels.cudnn_attention, BY_XLA, False),
        (kernels.cudnn_attention, BY_XLA, None),
    ],
)
def test_a_causal_kernel_has_the_window_of_its_layer(kernel, options, has_window):
    """Rows of one segment, then padding; None: all layers have the window."""
    q, k, v, _, dy = inputs(130, 130, 2, 2, "keys")
    slots = np.arange(130)
    distance = slots[:, None] - slots
    is_token = slots < np.array([[100], [130]])
    mask = (distance >= 0) & is_token[:, None]
    if has_window is not False:
        mask &= distance < WINDOW
    dy *= is_token[:, :, None, None]
    flag = None if has_window is None else jnp.bool_(has_window)
    pattern = SegmentPattern(is_token.astype(np.int32), WINDOW, flag, one_segment=True)
    attend = without_mask(kernel, "causal", pattern, **options)
    assert_equals_plain(attend, (q, k, v, mask[:, None], dy), None)


@pytest.mark.parametrize(
    "kernel, options",
    [(kernels.splash_attention, INTERPRETED), (kernels.cudnn_attention, BY_XLA)],
)
def test_a_kernel_of_all_keys_hides_what_it_is_padded_with(kernel, options):
    q, k, v, mask, dy = inputs(130, 257, 2, 2, "keys")
    attend = without_mask(kernel, "all", **options)
    assert_equals_plain(attend, (q, k, v, np.ones_like(mask), dy), None)


@pytest.mark.parametrize("kernel", [kernels.splash_attention, kernels.pallas_attention])
def test_a_kernel_by_segments_on_a_mesh_is_attention(kernel):
    *arrays, segments = packed_inputs(130, 4, 2, rows=4)
    attend = without_mask(kernel, "segments", SegmentPattern(segments), interpret=True)
    with jax.set_mesh(axes.make_mesh(Mesh(1, 4, 2))):
        assert_equals_plain(attend, arrays, None)


def test_splash_attention_on_a_mesh_is_attention():
    arrays = inputs(128, 128, 4, 2, "random", rows=4)
    with jax.set_mesh(axes.make_mesh(Mesh(1, 4, 2))):
        assert_equals_plain(splash, arrays, None)


CUDNN, PALLAS, SPLASH = "cudnn_attention", "pallas_attention", "splash_attention"
ONE = {"one_segment": True}
PACKED = {}
IMAGES = {"causal": False}
PLAIN = None
CHOICES = [  # platform, queries, keys, type, head dim, cap, pattern -> kernel and form of pattern
    ("cpu", 512, 512, "bfloat16", 64, None, ONE, PLAIN),
    # On a GPU: shapes that no kernel takes
    ("gpu", 512, 512, "float32", 64, None, ONE, PLAIN),
    ("gpu", 512, 512, "bfloat16", 256, None, ONE, PLAIN),
    ("gpu", 512, 512, "bfloat16", 64, 30.0, ONE, PLAIN),
    ("gpu", 1, 640, "bfloat16", 64, None, "mask", PLAIN),
    # rows
    ("gpu", 512, 512, "bfloat16", 64, None, ONE, (CUDNN, "causal")),
    ("gpu", 577, 577, "float16", 72, None, ONE, (CUDNN, "causal")),
    ("gpu", 512, 512, "bfloat16", 64, None, ONE | {"window": 64}, (CUDNN, "causal")),
    ("gpu", 512, 512, "bfloat16", 64, None, PACKED, (PALLAS, "segments")),
    ("gpu", 64, 64, "bfloat16", 64, None, PACKED, (CUDNN, "mask")),
    ("gpu", 512, 512, "bfloat16", 64, None, PACKED | {"window": 64}, (CUDNN, "mask")),
    ("gpu", 512, 512, "bfloat16", 64, None, "mask", (CUDNN, "mask")),
    # an encoder, alone or with packed images, and memories
    ("gpu", 512, 512, "bfloat16", 64, None, IMAGES, (PALLAS, "segments")),
    ("gpu", 577, 577, "bfloat16", 64, None, "all", (CUDNN, "all")),
    ("gpu", 512, 144, "bfloat16", 64, None, "all", (CUDNN, "all")),
    ("gpu", 512, 577, "bfloat16", 64, None, "mask", (CUDNN, "mask")),
    # On a TPU
    ("tpu", 64, 64, "bfloat16", 64, None, ONE, PLAIN),
    ("tpu", 512, 144, "bfloat16", 64, None, "all", PLAIN),
    ("tpu", 512, 512, "float32", 72, 30.0, ONE, (SPLASH, "causal")),
    ("tpu", 512, 512, "bfloat16", 64, None, PACKED | {"window": 64}, (SPLASH, "segments")),
    ("tpu", 512, 512, "bfloat16", 64, None, "mask", (SPLASH, "mask")),
    ("tpu", 577, 577, "bfloat16", 64, None, "all", (SPLASH, "all")),
    ("tpu", 512, 512, "bfloat16", 64, None, IMAGES, (SPLASH, "segments")),
]


@pytest.mark.parametrize("platform, queries, keys, dtype, width, cap, pattern, expected", CHOICES)
def test_shapes_and_pattern_choose_the_kernel(
    monkeypatch, platform, queries, keys, dtype, width, cap, pattern, expected
):
    monkeypatch.setattr(axes, "platform", lambda: platform)
    q, k = jnp.zeros((1, queries, 2, width), dtype), jnp.zeros((1, 2, keys, width), dtype)
    mask = None if pattern == "all" else jnp.ones((1, 1, queries, keys), bool)
    segments = None
    if isinstance(pattern, dict):
        segments = SegmentPattern(jnp.ones((1, queries), jnp.int32), **pattern)
    kernel = kernels.kernel_for(q, k, cap, mask, segments)
    assert (kernel and (kernel.attend.__name__, kernel.form)) == expected
