"""Gemma 3 with images: outputs equal to transformers', exact export."""

import pytest
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from tests.hub.parity import SMALL
from tests.hub.unified import MIXED, NEW, UnifiedLaws
from vlm_jax.config import UserError
from vlm_jax.hub.families.multimodal import gemma3

IMAGE = 60
TOWER = SiglipVisionConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    image_size=16,
    patch_size=4,
    layer_norm_eps=1e-3,
    vision_use_head=False,
)
TEXT = Gemma3TextConfig(
    **SMALL,
    head_dim=12,
    # Shorter than an image of four tokens.
    sliding_window=3,
    query_pre_attn_scalar=20,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    # Of the text-only model alone.
    final_logit_softcapping=0.5,
)
CONFIG = Gemma3Config(
    vision_config=TOWER, text_config=TEXT, mm_tokens_per_image=4, image_token_index=IMAGE
)


class TestGemma3(UnifiedLaws):
    MODELS = {"gemma 3": (Gemma3ForConditionalGeneration, CONFIG)}
    CACHED = ("gemma 3",)

    def config_keys(self, pair):
        return {"image_token_index": IMAGE}

    def inputs(self, pair, side, room=NEW, counts=MIXED):
        inputs = super().inputs(pair, side, room, counts)
        return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).astype(int)}


@pytest.mark.parametrize(
    "config, found",
    [
        (
            {"text_config": {"model_type": "gemma2"}},
            "text_config.model_type 'gemma2' .* gemma3_text",
        ),
        (
            {"vision_config": {"model_type": "clip_vision_model"}},
            "'clip_vision_model' .* siglip_vision_model",
        ),
        ({"mm_tokens_per_image": 5}, "mm_tokens_per_image 5 .* 14 x 14 patches"),
        ({"mm_tokens_per_image": 25}, "mm_tokens_per_image 25 .* 14 x 14 patches"),
        ({"mm_tokens_per_image": "4"}, "mm_tokens_per_image is '4'"),
        ({"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, found):
    config = {"mm_tokens_per_image": 49} | config
    with pytest.raises(UserError, match=found):
        gemma3.config_from_hf(config, ())


def test_the_short_config_of_the_published_files():
    """Keys that are missing have the values of transformers' classes."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    tower = {"hidden_size": 1152, "image_size": 896, "patch_size": 14, "vision_use_head": False}
    cfg = gemma3.config_from_hf({"text_config": text, "vision_config": tower}, ())
    assert cfg.image_tokens == 256
    assert (cfg.decoder.vocab_size, cfg.decoder.heads, cfg.decoder.head_dim) == (262_208, 8, 256)
    assert (cfg.decoder.rope.theta, cfg.decoder.rope.local_theta) == (1_000_000.0, 10_000.0)
    assert set(range(34)) - set(cfg.decoder.sliding_layers) == {5, 11, 17, 23, 29}
