"""Pixtral and Mistral 3: outputs equal to transformers', exact export."""

import numpy as np
import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from tests.hub.parity import SMALL
from tests.hub.unified import IMAGE_COUNTS, MIXED, NEW, TEXT_LENGTHS, UnifiedLaws, padded
from vlm_jax.config import UserError
from vlm_jax.hub.families.multimodal import mistral3

IMAGE, BREAK = 62, 61
# Rows and columns of the patches of images.
GRIDS = ((4, 6), (2, 4), (6, 2))
TOWER = PixtralVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=24,
    patch_size=4,
    rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
)
TEXT = MistralConfig(**SMALL, sliding_window=None, rms_norm_eps=1e-5, tie_word_embeddings=False)


class TestPixtral(UnifiedLaws):
    MODELS = {
        "mistral 3": (
            Mistral3ForConditionalGeneration,
            Mistral3Config(
                vision_config=TOWER,
                text_config=TEXT,
                image_token_index=IMAGE,
                tie_word_embeddings=False,
            ),
        ),
        "pixtral": (
            LlavaForConditionalGeneration,
            LlavaConfig(
                vision_config=TOWER,
                text_config=TEXT,
                image_token_index=IMAGE,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                multimodal_projector_bias=True,
                tie_word_embeddings=False,
            ),
        ),
    }
    # Decoding with the KV cache is compared in test_processor.py.
    test_cached_greedy_tokens_are_those_of_transformers = None

    def config_keys(self, pair):
        return {"image_token_index": IMAGE}

    def inputs(self, pair, side, room=NEW, counts=MIXED):
        merged = pair.cfg.vision.patch_square
        grids = iter(GRIDS)
        rng, rows, used = np.random.default_rng(0), [], []
        for length, count in zip(TEXT_LENGTHS, IMAGE_COUNTS[counts]):
            text = rng.integers(1, 50, length).tolist()
            own = [next(grids) for _ in range(count)]
            # From the last to the first: after the first token, and before the last three.
            for position, (height, width) in zip((length - 3, 1), own[::-1]):
                row = [IMAGE] * (width // merged) + [BREAK]
                text[position:position] = row * (height // merged)
            rows.append(text)
            used += own
        arrays = padded(rows, side, 50 // merged + room)
        if not used:
            return arrays
        sizes = 4 * np.array(used)
        pixels = np.zeros((len(used), 3, *sizes.max(axis=0)), np.float32)
        for image, (height, width) in zip(pixels, sizes):
            image[:, :height, :width] = rng.normal(size=(3, height, width))
        return arrays | {"pixel_values": pixels, "image_sizes": sizes}

    def image_features(self, pair, inputs):
        pixels, sizes = (torch.tensor(inputs[x]) for x in ("pixel_values", "image_sizes"))
        features = pair.hf.get_image_features(pixels, image_sizes=sizes)
        return torch.cat(tuple(features.pooler_output))


@pytest.mark.parametrize(
    "config, found",
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer -2"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model' .* pixtral"),
        ({"vision_config": {"head_dim": 32}}, "head_dim 32 .* 64"),
        ({"text_config": {"rms_norm_eps": 1e-6}}, "rms_norm_eps 1e-06 .* 1e-05"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, found):
    with pytest.raises(UserError, match=found):
        mistral3.config_from_hf(config, ())
