"""Fuyu: our outputs are those of transformers for images of any size, and what is exported is what was loaded."""

import numpy as np
import pytest
import torch
from transformers import FuyuConfig, FuyuForCausalLM

from tests.hub.unified import (
    IMAGE_COUNTS,
    Pair,
    assert_an_export_is_what_was_loaded,
    assert_blocks_are_equal,
    assert_greedy_tokens_are_equal,
    assert_image_features_are_equal,
    assert_logits_are_equal,
    images_of,
    new_pair,
    padded,
    rows_of,
)
from vlm_jax.hub.families import fuyu

IMAGE, NEWLINE = 60, 61
PATCHES = [IMAGE, IMAGE, NEWLINE, IMAGE, IMAGE, NEWLINE]  # an image of two rows of two patches
NAMES = {fuyu.HEAD}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 250.0, "partial_rotary_factor": 0.5},
}


def model(**text):
    torch.manual_seed(0)
    return FuyuForCausalLM(
        FuyuConfig(text_config={**TEXT, **text}, patch_size=4, image_size=8, image_token_id=IMAGE)
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return new_pair(model(), tmp_path_factory.mktemp("fuyu"))


def inputs_of(counts, side):
    return padded(rows_of(counts, PATCHES), side) | images_of(counts, 4, 48)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", IMAGE_COUNTS.values(), ids=IMAGE_COUNTS)
def test_logits_are_those_of_transformers(both, counts, side):
    assert_logits_are_equal(both, 1e-4, **inputs_of(counts, side))


def test_images_of_different_sizes_come_as_patches_in_one_list(both):
    image_rows = [[IMAGE] * 3 + [NEWLINE], [IMAGE, NEWLINE] * 2, [IMAGE] * 2 + [NEWLINE]]
    inputs = padded([[*image, 3, 5, 7 + i] for i, image in enumerate(image_rows)], "left")
    inputs["pixel_values"] = np.random.default_rng(1).normal(size=(7, 48)).astype(np.float32)
    assert_logits_are_equal(both, 1e-4, **inputs)
    older = {"image_patches" if name == "pixel_values" else name: x for name, x in inputs.items()}
    np.testing.assert_array_equal(both.logits(**older), both.logits(**inputs))


def test_blocks_are_those_of_transformers(both):
    assert_blocks_are_equal(both, 1e-4, **inputs_of((2, 0, 1), "left"))


def test_image_features_are_those_of_transformers(both):
    inputs = inputs_of((2, 0, 1), "left")
    features = both.theirs.model.get_image_features(
        torch.tensor(inputs["pixel_values"])
    ).last_hidden_state
    assert_image_features_are_equal(both, features.flatten(0, 1), 1e-5, **inputs)


def test_greedy_tokens_are_those_of_transformers(both):
    assert_greedy_tokens_are_equal(both, **inputs_of((2, 0, 1), "left"))


def test_without_norms_of_queries_and_keys(tmp_path):
    assert_logits_are_equal(
        new_pair(model(qk_layernorm=False), tmp_path), 1e-4, **inputs_of((1, 1, 1), "left")
    )


def test_an_export_is_what_was_loaded_and_transformers_loads_it(both, tmp_path):
    assert_an_export_is_what_was_loaded(
        both, tmp_path, 1e-4, inputs_of((2, 0, 1), "left"), image_token_id=IMAGE
    )


def test_the_names_that_transformers_has_in_memory_load_too(both, tmp_path):
    both.theirs.save_pretrained(tmp_path, save_original_format=False)
    assert_logits_are_equal(Pair.of(both.theirs, tmp_path), 1e-4, **inputs_of((1, 1, 1), "left"))


def test_the_published_file_has_the_decoder_flat_and_half_of_a_head_turned():
    flat = {name: value for name, value in TEXT.items() if name != "rope_parameters"} | {
        "rope_theta": 77.0
    }
    decoder = fuyu.config_from_hf({"model_type": "fuyu", **flat}, NAMES).decoder
    theirs = FuyuConfig(**flat).text_config
    assert decoder.rope.theta == theirs.rope_parameters["rope_theta"] == 77.0
    assert decoder.rope.fraction == theirs.rope_parameters["partial_rotary_factor"] == 0.5
    assert (
        (decoder.width, decoder.depth) == (theirs.hidden_size, theirs.num_hidden_layers) == (32, 3)
    )
