"""Two-tower models: pooling, padding, logits and initial values."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta

from vlm_jax.axes import make_mesh
from vlm_jax.config import (
    Contrastive,
    Decoder,
    Mesh,
    UserError,
    Vision,
)
from vlm_jax.nn.models import abstract_params, build_model
from vlm_jax.sharding import parameter_shardings

STACK = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24}
VISION = Vision(**STACK, image_size_px=16, patch_size_px=8, class_token=True, pool="class")
TEXT = Decoder(**STACK, vocab_size=32, positions="learned", max_positions=8)
EOS = 20
CLIP = Contrastive(VISION, TEXT, embed_width=12, text_pool="first_eos", eos_id=EOS)
SIGLIP = Contrastive(
    VISION,
    TEXT,
    embed_width=16,
    image_projection=False,
    text_projection_bias=True,
    causal=False,
    text_pool="last",
    logit_bias=True,
)
both = pytest.mark.parametrize("cfg", [CLIP, SIGLIP], ids=["clip", "siglip"])
IMAGES = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
IDS = np.array(
    [[1, 2, 3, 4, 5, EOS, 7, 8], [9, 10, EOS, 12, 13, 14, 15, 25], [1, 2, 3, 4, 5, 6, 7, EOS]]
)


EVERY_TOKEN = np.ones(IDS.shape, bool)


@functools.cache
def random_params(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), meta.unbox(abstract_params(cfg))
    )


@functools.partial(jax.jit, static_argnames="cfg")
def model(cfg, params, images, ids):
    return build_model(cfg).apply({"params": params}, images, ids)


@functools.partial(jax.jit, static_argnames="cfg")
def _text_features(cfg, params, ids, attention_mask):
    return build_model(cfg).apply({"params": params}, ids, attention_mask, method="text_features")


def text_features(cfg, ids, attention_mask=EVERY_TOKEN):
    return _text_features(cfg, random_params(cfg), ids, attention_mask)


def changes(a, b):
    """(R,) bool: the feature of each text differs."""
    return np.abs(a - b).max(axis=-1) > 1e-3


@both
def test_embeds_have_length_one_and_logits_are_their_scaled_products(cfg):
    params = random_params(cfg)
    output = model(cfg, params, IMAGES, IDS)
    assert output.logits_per_image.shape == (2, 3)
    for embeds in (output.image_embeds, output.text_embeds):
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=-1), 1, rtol=1e-5)
    expected = output.image_embeds @ output.text_embeds.T * np.exp(params["logit_scale"])
    expected += params["logit_bias"] if cfg.logit_bias else 0
    np.testing.assert_allclose(output.logits_per_image, expected, rtol=1e-5, atol=1e-6)
    # Without a mask every token counts.
    features = text_features(cfg, IDS)
    embeds = features / np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(output.text_embeds, embeds, atol=1e-6)


def test_a_text_is_its_first_eos_and_the_tokens_before():
    texts = text_features(CLIP, IDS)
    later, before = IDS.copy(), IDS.copy()
    later[0, 6:], later[1, 3:] = EOS, 31
    before[:, 0] = 17
    np.testing.assert_allclose(text_features(CLIP, later), texts, atol=1e-6)
    assert changes(text_features(CLIP, before), texts).all()


def test_a_text_may_be_its_largest_id_instead():
    """The second text has a larger id after its EOS token."""
    largest = text_features(replace(CLIP, text_pool="largest_id"), IDS)
    assert changes(largest, text_features(CLIP, IDS)).tolist() == [False, True, False]


def test_without_a_causal_mask_every_token_counts_but_padding():
    changed = IDS.copy()
    changed[:, 3] = 31
    assert changes(text_features(SIGLIP, changed), text_features(SIGLIP, IDS)).all()
    mask = EVERY_TOKEN.copy()
    mask[:, 3] = False
    np.testing.assert_allclose(
        text_features(SIGLIP, changed, mask), text_features(SIGLIP, IDS, mask), atol=1e-6
    )


@both
@pytest.mark.parametrize(
    "ids, message",
    [
        (np.ones((1, 9), int), "9 tokens are too many: the model has 8 positions"),
        (np.array([[1, 32]]), "id 32 is outside the table of 32 rows"),
        (np.array([[1, -1]]), "id -1 is outside"),
    ],
)
def test_a_text_outside_the_tables_is_refused(cfg, ids, message):
    with pytest.raises(UserError, match=message):
        build_model(cfg).apply(
            {"params": random_params(cfg)}, jnp.asarray(ids), method="text_features"
        )
    if ids.shape[1] > 8:  # lengths, but not ids, are known while tracing
        with pytest.raises(UserError, match=message):
            text_features(cfg, ids, np.ones(ids.shape, bool))


@both
def test_every_parameter_has_logical_axes_and_a_sharding(cfg):
    boxes = traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    parameter_shardings(boxes, make_mesh(Mesh(fsdp=2, tensor=2)))
    assert all(len(box.letters.split()) == box.value.ndim for box in boxes.values())
    assert {path.split("/")[0] for path in boxes} - {"image_projection", "logit_bias"} == {
        *("vision", "text", "text_projection", "logit_scale")
    }


@both
def test_a_new_model_begins_as_its_paper_says(cfg):
    @jax.jit
    def initial_scalars(key):
        # XLA drops the initializers of everything that is not returned.
        images, ids = jnp.asarray(IMAGES), jnp.asarray(IDS)
        params = meta.unbox(build_model(cfg).init(key, images, ids)["params"])
        return params["logit_scale"], params.get("logit_bias")

    scale, bias = initial_scalars(jax.random.key(0))
    assert jnp.exp(scale)[0] == pytest.approx(1 / 0.07)
    assert (bias is None) == (not cfg.logit_bias)
    assert bias is None or bias[0] == -10
