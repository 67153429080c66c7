"""LLaVA: our outputs are those of transformers, and what is exported is what was loaded."""

import pytest
import torch
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
from vlm_jax.config import UserError
from vlm_jax.hub.families import llava

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
    "clip and llama": LlavaConfig(vision_config=CLIP, text_config=LlamaConfig(**SMALL)),
    "clip with its class token, two layers, and mistral": LlavaConfig(
        vision_config=CLIP,
        text_config=MistralConfig(**SMALL, sliding_window=4),
        vision_feature_layer=[1, -1],
        projector_hidden_act="gelu_pytorch_tanh",
        multimodal_projector_bias=False,
        **FULL,
    ),
    "siglip and tied qwen2": LlavaConfig(
        vision_config=SIGLIP,
        text_config=Qwen2Config(**SMALL, tie_word_embeddings=True),
        vision_feature_layer=-1,
        **FULL,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    torch.manual_seed(0)
    config = MODELS[request.param]
    config.image_token_index = IMAGE
    return new_pair(LlavaForConditionalGeneration(config), tmp_path_factory.mktemp("llava"))


def inputs_of(both, counts, side="left"):
    return padded(rows_of(counts, [IMAGE] * both.cfg.image_tokens), side) | images_of(
        counts, 3, 16, 16
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", IMAGE_COUNTS.values(), ids=IMAGE_COUNTS)
def test_logits_are_those_of_transformers(both, counts, side):
    assert_logits_are_equal(both, 1e-4, **inputs_of(both, counts, side))


def test_blocks_are_those_of_transformers(both):
    assert_blocks_are_equal(both, 1e-4, **inputs_of(both, (2, 0, 1)))


def test_image_features_are_those_of_transformers(both):
    inputs = inputs_of(both, (2, 0, 1))
    features = both.theirs.get_image_features(torch.tensor(inputs["pixel_values"])).pooler_output
    assert_image_features_are_equal(both, torch.cat(tuple(features)), 1e-4, **inputs)


def test_greedy_tokens_are_those_of_transformers(both):
    assert_greedy_tokens_are_equal(both, **inputs_of(both, (2, 0, 1)))


def test_an_export_is_what_was_loaded_and_transformers_loads_it(both, tmp_path):
    assert_an_export_is_what_was_loaded(
        both, tmp_path, 1e-4, inputs_of(both, (2, 0, 1)), image_token_index=IMAGE
    )


def test_the_names_that_transformers_has_in_memory_load_too(both, tmp_path):
    both.theirs.save_pretrained(tmp_path, save_original_format=False)
    assert_logits_are_equal(Pair.of(both.theirs, tmp_path), 1e-4, **inputs_of(both, (1, 1, 1)))


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
            {"vision_config": {"model_type": "pixtral"}},
            "vision_config.model_type 'pixtral' .* clip_vision_model",
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
