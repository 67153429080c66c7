"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: outputs equal to transformers', exact export."""

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.hub.parity import SMALL
from tests.hub.unified import IMAGE_COUNTS, MIXED, NEW, TEXT_LENGTHS, UnifiedLaws, padded
from vlm_jax.config import UserError
from vlm_jax.hub.families.multimodal import qwen2_vl

TOWER = {"depth": 3, "num_heads": 2, "patch_size": 4}
IMAGE = 60
# Rows and columns of the patches of images; 2 x 2 patches become a token.
GRIDS = ((6, 10), (2, 4), (8, 2))
TEXT = SMALL | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": False,
}
IDS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62}


class TestQwen2VL(UnifiedLaws):
    MODELS = {
        "2.5, with windows of 4 x 4 patches": (
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig(
                vision_config=TOWER
                | {
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "out_hidden_size": 32,
                    "window_size": 16,
                    "fullatt_block_indexes": [1],
                },
                text_config=TEXT,
                **IDS,
            ),
        ),
        "2, tied": (
            Qwen2VLForConditionalGeneration,
            Qwen2VLConfig(
                vision_config=TOWER | {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32},
                text_config=TEXT | {"tie_word_embeddings": True},
                tie_word_embeddings=True,
                **IDS,
            ),
        ),
        "3, with the hidden states of two blocks": (
            Qwen3VLForConditionalGeneration,
            Qwen3VLConfig(
                vision_config=TOWER
                | {
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "out_hidden_size": 32,
                    "num_position_embeddings": 25,
                    "deepstack_visual_indexes": [0, 1],
                },
                text_config=TEXT | {"head_dim": 8},
                **IDS,
            ),
        ),
    }
    # Decoding with the KV cache is compared in test_processor.py.
    test_cached_greedy_tokens_are_those_of_transformers = None

    def config_keys(self, pair):
        return IDS

    def inputs(self, pair, side, room=NEW, counts=MIXED):
        grids = iter(GRIDS)
        rng, rows, used = np.random.default_rng(0), [], []
        for length, count in zip(TEXT_LENGTHS, IMAGE_COUNTS[counts]):
            text = rng.integers(1, 50, length).tolist()
            own = [next(grids) for _ in range(count)]
            # From the last to the first: after the first token, and before the last three.
            for position, (height, width) in zip((length - 3, 1), own[::-1]):
                text[position:position] = [IMAGE] * (height * width // 4)
            rows.append(text)
            used += own
        arrays = padded(rows, side, 34 + room)
        if not used:
            return arrays
        patches = [rng.normal(size=(h * w, 3, 1, 4, 4)) for h, w in used]
        values = np.concatenate(patches).repeat(2, axis=2).reshape(-1, 96)
        return arrays | {
            "pixel_values": values.astype(np.float32),
            "image_grid_thw": np.array([(1, *grid) for grid in used]),
            "mm_token_type_ids": (arrays["input_ids"] == IMAGE).astype(int),
        }

    def image_features(self, pair, inputs):
        pixels, grids = (torch.tensor(inputs[x]) for x in ("pixel_values", "image_grid_thw"))
        features = pair.hf.get_image_features(pixels, grids)
        parts = [features.pooler_output, *getattr(features, "deepstack_features", ())]
        return torch.cat([torch.cat(tuple(part)) for part in parts], dim=-1)


@pytest.mark.parametrize(
    "config, found",
    [
        ({"vision_config": {"in_channels": 1}}, "in_channels is 1, but must be 3"),
        ({"vision_config": {"window_size": 14}}, "window_size 14 is smaller than the 2 x 2 patch"),
        ({"rope_scaling": {"mrope_section": [8, 8, 8]}}, "mrope_section of 64 frequencies"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "must have the type mrope"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, found):
    with pytest.raises(UserError, match=found):
        qwen2_vl.QWEN2_5_VL.config_from_hf(config, ())
