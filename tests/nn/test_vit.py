"""The image encoder: which tokens leave it, and what each setting does."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from vlm_jax.config import PatchRope, Vision
from vlm_jax.nn.patches import patchify
from vlm_jax.nn.vit import ViT

TINY = Vision(image_size_px=8, patch_size_px=4, width=16, depth=2, heads=2, mlp_width=32)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


def random_params(cfg, images=IMAGES):
    shapes = meta.unbox(jax.eval_shape(ViT(cfg).init, jax.random.key(0), images)).get("params", {})
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg, params, images=IMAGES):
    return ViT(cfg).apply({"params": params}, images)


def test_kind_none_gives_the_raw_patches_and_has_no_parameters():
    cfg = replace(TINY, kind="none", positions="none")
    assert random_params(cfg) == {}
    np.testing.assert_array_equal(encode(cfg, {}), patchify(IMAGES, 4))


def test_the_class_token_is_kept_or_dropped_in_front_of_the_same_patches():
    dropping = replace(TINY, class_token=True)
    keeping = replace(dropping, keep_class_token=True)
    params = random_params(keeping)
    with_class, without = encode(keeping, params), encode(dropping, params)
    assert with_class.shape == (2, 1 + 4, 16)
    np.testing.assert_array_equal(with_class[:, 1:], without)


def test_patches_read_the_class_token_and_registers_which_do_not_leave():
    cfg = replace(TINY, class_token=True, keep_class_token=True, registers=3)
    params = random_params(cfg)
    tokens = encode(cfg, params)
    assert tokens.shape == (2, 1 + 4, 16)
    for name in ("class_token", "registers"):
        other = params | {name: -params[name]}
        assert np.abs(encode(cfg, other) - tokens)[:, 1:].max() > 1e-3


@pytest.mark.parametrize("kind", ["none", "same"])
def test_rope_gives_patches_positions(kind):
    """Without positions, patches of a row that change places take their tokens along."""
    cfg = replace(TINY, positions="none", rope=PatchRope(kind))
    params = random_params(cfg)
    swapped = encode(cfg, params, jnp.concatenate([IMAGES[:, :, 4:], IMAGES[:, :, :4]], axis=2))
    difference = np.abs(swapped[:, [1, 0, 3, 2]] - encode(cfg, params)).max()
    assert difference > 1e-2 if kind == "same" else difference < 1e-4


def test_linear_and_conv_encoders_agree():
    params = random_params(TINY)
    np.testing.assert_allclose(
        encode(TINY, params), encode(replace(TINY, patch_embed="conv"), params), atol=1e-4
    )


def test_every_patch_reads_every_other():
    """Not causal: the last patch changes the first token, and the first patch the last token."""
    params = random_params(TINY)
    tokens = encode(TINY, params)
    for patch, token in (((slice(4, 8), slice(4, 8)), 0), ((slice(0, 4), slice(0, 4)), 3)):
        changed = encode(TINY, params, IMAGES.at[:, *patch].add(1.0))
        assert np.abs(changed[:, token] - tokens[:, token]).max() > 1e-3


def test_images_of_a_batch_do_not_see_each_other():
    params = random_params(TINY)
    changed = encode(TINY, params, IMAGES.at[1].add(1.0))
    np.testing.assert_array_equal(changed[0], encode(TINY, params)[0])


@pytest.mark.parametrize(
    "norm, present, absent", [("pre_norm", True, False), ("final_norm", "tokens", "none")]
)
def test_a_norm_exists_only_if_configured(norm, present, absent):
    with_norm, without = replace(TINY, **{norm: present}), replace(TINY, **{norm: absent})
    params = random_params(with_norm)
    assert norm in params
    assert norm not in random_params(without)
    others = {name: value for name, value in params.items() if name != norm}
    assert np.abs(encode(with_norm, params) - encode(without, others)).max() > 1e-2


def test_the_final_norm_is_applied_last():
    params = random_params(TINY)
    params["final_norm"] = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}
    tokens = encode(TINY, params)
    np.testing.assert_allclose(tokens.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(tokens.std(-1), 1, atol=1e-3)
