"""Fuyu: outputs equal to transformers' for images of any size, exact export."""

import numpy as np
import torch
from transformers import FuyuConfig, FuyuForCausalLM

from tests.hub.unified import UnifiedLaws, assert_logits_are_equal, padded, random_images
from vlm_jax.hub.families.multimodal import fuyu

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


def config(**text) -> FuyuConfig:
    text = {**TEXT, **text}
    return FuyuConfig(text_config=text, patch_size=4, image_size=8, image_token_id=IMAGE)


class TestFuyu(UnifiedLaws):
    MODELS = {
        "as published": (FuyuForCausalLM, config()),
        "without norms of queries and keys": (FuyuForCausalLM, config(qk_layernorm=False)),
    }
    CACHED = ("as published",)
    FEATURES_ATOL = 1e-5

    def config_keys(self, pair):
        return {"image_token_id": IMAGE}

    def image_ids(self, pair):
        return PATCHES

    def pixels(self, counts):
        return random_images(counts, 4, 48)

    def image_features(self, pair, inputs):
        pixels = torch.tensor(inputs["pixel_values"])
        return pair.hf.model.get_image_features(pixels).last_hidden_state.flatten(0, 1)

    def test_images_of_different_sizes_come_as_patches_in_one_list(self, pairs):
        pair = pairs("as published")
        image_rows = [[IMAGE] * 3 + [NEWLINE], [IMAGE, NEWLINE] * 2, [IMAGE] * 2 + [NEWLINE]]
        inputs = padded([[*image, 3, 5, 7 + i] for i, image in enumerate(image_rows)], "left")
        inputs["pixel_values"] = np.random.default_rng(1).normal(size=(7, 48)).astype(np.float32)
        assert_logits_are_equal(pair, 1e-4, **inputs)
        older = inputs | {"image_patches": inputs["pixel_values"]}
        del older["pixel_values"]
        np.testing.assert_array_equal(pair.logits(**older), pair.logits(**inputs))


def test_the_published_file_has_the_decoder_flat_and_half_of_a_head_turned():
    flat = {name: value for name, value in TEXT.items() if name != "rope_parameters"} | {
        "rope_theta": 77.0
    }
    decoder = fuyu.config_from_hf({"model_type": "fuyu", **flat}, NAMES).decoder
    expected = FuyuConfig(**flat).text_config
    assert decoder.rope.theta == expected.rope_parameters["rope_theta"] == 77.0
    assert decoder.rope.fraction == expected.rope_parameters["partial_rotary_factor"] == 0.5
    assert (
        (decoder.width, decoder.depth)
        == (expected.hidden_size, expected.num_hidden_layers)
        == (32, 3)
    )
