"""InternVL: outputs equal to transformers', exact export."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.hub.parity import SMALL
from tests.hub.unified import UnifiedLaws
from vlm_jax.config import Rope, UserError
from vlm_jax.hub.families.multimodal import internvl
from vlm_jax.hub.inputs import to_batch
from vlm_jax.nn.vlm import empty_cache
from vlm_jax.testing import tiny

TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": [16, 16],
    "patch_size": [4, 4],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}


def config(text, **tower) -> InternVLConfig:
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**TOWER, **tower),
        text_config=text,
        image_token_id=60,
        image_seq_length=4,
        tie_word_embeddings=text.tie_word_embeddings,
    )


class TestInternVL(UnifiedLaws):
    MODELS = {
        "as published, with qwen2": (
            InternVLForConditionalGeneration,
            config(Qwen2Config(**SMALL, rope_parameters=DYNAMIC), attention_bias=True),
        ),
        "rmsnorm, norms of queries and keys, and tied qwen3": (
            InternVLForConditionalGeneration,
            config(
                Qwen3Config(**SMALL, head_dim=12, tie_word_embeddings=True),
                norm_type="rms_norm",
                use_qk_norm=True,
                use_mask_token=True,
            ),
        ),
    }
    # Decoding with the KV cache is compared in test_processor.py.
    test_cached_greedy_tokens_are_those_of_transformers = None

    def config_keys(self, pair):
        return {"image_token_id": pair.checkpoint.image_token}

    def test_the_eps_that_no_file_has_is_that_of_transformers(self, pair):
        """Random features are too large for it to show."""
        layer_norm = pair.hf.model.multi_modal_projector.layer_norm
        assert pair.cfg.projector.norm_eps == layer_norm.eps


def test_a_text_beyond_dynamic_rope_is_refused():
    """Up to max_positions it changes nothing."""
    cfg = tiny("text_only")
    rope = Rope(scaling="dynamic", factor=2.0)
    cfg = replace(cfg, decoder=replace(cfg.decoder, rope=rope, max_positions=4))
    ids = np.ones((1, 5), int)
    with pytest.raises(UserError, match="token at position 4, .* only 4 positions"):
        to_batch(cfg, {"input_ids": ids}, None)
    batch = to_batch(cfg, {"input_ids": ids[:, :4]}, None)
    with pytest.raises(UserError, match="5 tokens are too many: the model has 4 positions"):
        empty_cache(cfg.model, batch, 2)


@pytest.mark.parametrize(
    "config, found",
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer -2 is not supported, only -1"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3, but must be 1 divided by"),
        ({"downsample_ratio": 0.2}, "downsample_ratio 0.2 is not supported: .* 32 x 32 patches"),
        ({"vision_config": {"use_qk_norm": True}}, "use_qk_norm .* norm_type 'rms_norm'"),
        (
            {"vision_config": {"use_mean_pooling": False, "norm_type": "rms_norm"}},
            "use_mean_pooling False .* norm_type 'layer_norm'",
        ),
        (
            {"vision_config": {"use_absolute_position_embeddings": False}},
            "use_absolute_position_embeddings False",
        ),
        ({"text_config": {"model_type": "phi3"}}, "'phi3' .* llama, mistral, qwen2, qwen3"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, found):
    with pytest.raises(UserError, match=found):
        internvl.config_from_hf(config, ())
