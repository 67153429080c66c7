"""Two towers: what a vector of a text or an image depends on, and what the numbers between them are."""

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


def params_of(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), meta.unbox(abstract_params(cfg))
    )


def run(cfg, *inputs, method=None, params=None):
    apply = jax.jit(
        lambda params, *given: build_model(cfg).apply({"params": params}, *given, method=method)
    )
    return apply(params_of(cfg) if params is None else params, *inputs)


@both
def test_vectors_have_the_length_one_and_logits_are_their_scaled_products(cfg):
    params, found = params_of(cfg), run(cfg, IMAGES, IDS)
    assert found.logits_per_image.shape == (2, 3)
    for vectors in (found.image_embeds, found.text_embeds):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)
    expected = found.image_embeds @ found.text_embeds.T * np.exp(params["logit_scale"])
    expected += params["logit_bias"] if cfg.logit_bias else 0
    np.testing.assert_allclose(found.logits_per_image, expected, rtol=1e-5, atol=1e-6)


def test_a_text_is_its_first_end_and_what_stands_before():
    texts = run(CLIP, IDS, method="text_features")
    later, before = IDS.copy(), IDS.copy()
    later[0, 6:], later[1, 3:] = EOS, 31
    before[:, 0] = 17
    np.testing.assert_allclose(run(CLIP, later, method="text_features"), texts, atol=1e-6)
    assert (np.abs(run(CLIP, before, method="text_features") - texts).max(axis=-1) > 1e-3).all()


def test_a_text_may_be_its_largest_id_instead():
    """In the second text a larger one stands after the end."""
    largest = run(replace(CLIP, text_pool="largest_id"), IDS, method="text_features")
    apart = np.abs(largest - run(CLIP, IDS, method="text_features")).max(axis=-1)
    assert (apart > 1e-3).tolist() == [False, True, False]


def test_without_a_direction_every_token_counts_unless_it_is_padding():
    texts = run(SIGLIP, IDS, method="text_features")
    changed = IDS.copy()
    changed[:, 3] = 31
    assert (np.abs(run(SIGLIP, changed, method="text_features") - texts).max(axis=-1) > 1e-3).all()
    there = np.ones(IDS.shape, bool)
    there[:, 3] = False
    masked, masked_changed = (
        run(SIGLIP, ids, there, method="text_features") for ids in (IDS, changed)
    )
    np.testing.assert_allclose(masked, masked_changed, atol=1e-6)


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
        build_model(cfg).apply({"params": params_of(cfg)}, jnp.asarray(ids), method="text_features")
    if ids.shape[1] > 8:
        with pytest.raises(UserError, match=message):
            run(cfg, ids, method="text_features")  # a length is known while tracing


@both
def test_every_parameter_has_its_letters_and_a_place_on_the_mesh(cfg):
    boxes = traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    parameter_shardings(boxes, make_mesh(Mesh(fsdp=2, tensor=2)))
    assert all(len(box.letters.split()) == box.value.ndim for box in boxes.values())
    assert {path.split("/")[0] for path in boxes} - {"image_projection", "logit_bias"} == {
        *("vision", "text", "text_projection", "logit_scale")
    }


@both
def test_a_new_model_begins_as_its_paper_says(cfg):
    params = meta.unbox(jax.jit(build_model(cfg).init)(jax.random.key(0), IMAGES, IDS)["params"])
    assert jnp.exp(params["logit_scale"])[0] == pytest.approx(1 / 0.07)
    assert "logit_bias" not in params or params["logit_bias"][0] == -10
