"""LLaVA: outputs equal to transformers', exact export."""

import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.hub.parity import SMALL
from tests.hub.unified import UnifiedLaws
from vlm_jax.config import UserError
from vlm_jax.hub.families.multimodal import llava

IMAGE = 60
TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
}
CLIP, SIGLIP = CLIPVisionConfig(**TOWER), SiglipVisionConfig(**TOWER)
FULL = {"vision_feature_select_strategy": "full"}
MODELS = {
    "clip and llama": LlavaConfig(
        vision_config=CLIP, text_config=LlamaConfig(**SMALL), image_token_index=IMAGE
    ),
    "clip with its class token, two layers, and mistral": LlavaConfig(
        vision_config=CLIP,
        text_config=MistralConfig(**SMALL, sliding_window=4),
        vision_feature_layer=[1, -1],
        projector_hidden_act="gelu_pytorch_tanh",
        multimodal_projector_bias=False,
        image_token_index=IMAGE,
        **FULL,
    ),
    "siglip and tied qwen2": LlavaConfig(
        vision_config=SIGLIP,
        text_config=Qwen2Config(**SMALL, tie_word_embeddings=True),
        vision_feature_layer=-1,
        image_token_index=IMAGE,
        **FULL,
    ),
}


class TestLlava(UnifiedLaws):
    MODELS = {kind: (LlavaForConditionalGeneration, config) for kind, config in MODELS.items()}
    CACHED = ("clip with its class token, two layers, and mistral",)

    def config_keys(self, pair):
        return {"image_token_index": IMAGE}


def test_the_nearly_empty_config_of_the_published_files():
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5},
    }
    config |= {"vision_config": {"model_type": "clip_vision_model", **TOWER}}
    cfg = llava.config_from_hf(config, {llava.HEAD})
    assert (cfg.decoder.width, cfg.decoder.depth, cfg.decoder.mlp_width) == (4096, 32, 11008)
    assert not cfg.decoder.tie_word_embeddings
    assert cfg.vision.feature_layers == (-2,)
    assert not cfg.vision.keep_class_token


@pytest.mark.parametrize(
    "config, found",
    [
        (
            {"text_config": {"model_type": "bloom"}},
            "text_config.model_type 'bloom' .* llama, mistral, qwen2",
        ),
        (
            {"vision_config": {"model_type": "dinov2"}},
            "vision_config.model_type 'dinov2' .* clip_vision_model",
        ),
        (
            {"vision_config": TOWER, "vision_feature_layer": [1, 4]},
            "vision_feature_layer .* 4 hidden states",
        ),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "vision_feature_select_strategy 'default'",
        ),
        (
            {"vision_feature_select_strategy": "cls_patch"},
            "vision_feature_select_strategy 'cls_patch' .* default, full",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, found):
    with pytest.raises(UserError, match=found):
        llava.config_from_hf(config, ())
