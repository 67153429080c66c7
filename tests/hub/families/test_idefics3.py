"""Idefics3 and SmolVLM: outputs equal to transformers', exact export."""

import numpy as np
import pytest
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.hub.parity import SMALL
from tests.hub.unified import MIXED, UnifiedLaws, random_images
from vlm_jax.config import UserError
from vlm_jax.hub.families.multimodal import idefics3

TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
}
SETTINGS = {"vision_config": TOWER, "text_config": LlamaConfig(**SMALL), "image_token_id": 60}


class TestIdefics3(UnifiedLaws):
    # One compiled program.
    MODELS = {
        "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config(**SETTINGS)),
        "smolvlm": (SmolVLMForConditionalGeneration, SmolVLMConfig(**SETTINGS)),
    }
    # Decoding with the KV cache is compared in test_processor.py.
    test_cached_greedy_tokens_are_those_of_transformers = None

    def config_keys(self, pair):
        return {"image_token_id": pair.checkpoint.image_token}

    def pixels(self, counts):
        """Images by row, filled up with blank ones."""
        images = random_images(counts, 3, 16, 16)
        if not images:
            return {}
        rows = np.zeros((len(counts), max(counts), 3, 16, 16), np.float32)
        is_image = np.arange(max(counts)) < np.array(counts)[:, None]
        rows[is_image] = images["pixel_values"]
        return {"pixel_values": rows}

    def test_an_image_with_padding_is_refused(self, pairs):
        pair = pairs("idefics3")
        inputs = self.inputs(pair, "left", counts=MIXED)
        mask = np.ones(inputs["pixel_values"].shape[:2] + (16, 16), int)
        pair.batch(**inputs, pixel_attention_mask=mask)
        mask[0, 0, :, 12:] = 0
        with pytest.raises(UserError, match="pixel_attention_mask has padding within an image"):
            pair.batch(**inputs, pixel_attention_mask=mask)


def test_the_short_config_of_the_published_files():
    """SmolVLM-256M leaves the sizes of Idefics3's default encoder out."""
    config = {
        "scale_factor": 4,
        "text_config": {"model_type": "llama", "vocab_size": 49280},
        "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512},
    }
    config["vision_config"]["patch_size"] = 16
    cfg = idefics3.config_from_hf(config, {idefics3.HEAD})
    assert (cfg.vision.depth, cfg.vision.mlp_width, cfg.vision.pool) == (12, 3072, "none")
    assert cfg.image_tokens == 64
    assert not cfg.decoder.tie_word_embeddings


@pytest.mark.parametrize(
    "config, found",
    [
        ({"text_config": {"model_type": "bloom"}}, "'bloom' .* llama, mistral, qwen2"),
        ({"scale_factor": 3}, "scale_factor 3 is not supported: .* 7 x 7 patches"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, found):
    with pytest.raises(UserError, match=found):
        idefics3.config_from_hf({"scale_factor": 7} | config, ())
