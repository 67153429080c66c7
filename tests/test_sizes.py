"""Configs of published models have the published size and equal the hub's config.json."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax.linen import meta

from vlm_jax.config import files
from vlm_jax.config.validate import validate
from vlm_jax.hub.export import architecture_fields
from vlm_jax.hub.families.registry import FAMILIES
from vlm_jax.nn.models import abstract_params

CONFIGS = Path(__file__).parents[1] / "configs" / "published"
PARAMETERS = {
    "gpt2": 124_439_808,
    "llama_3_2_1b": 1_235_814_400,
    # 751,632,384 in its file on the hub, which holds the tied embedding a second time as the head.
    "qwen3_0_6b": 751_632_384 - 151_936 * 1024,
    "olmo_2_1b": 1_484_916_736,
    "smollm3_3b": 3_075_098_624,
    "phi_3_mini": 3_821_079_552,
    "gemma_2b": 2_506_172_416,
    "gemma3_1b": 999_885_952,
    "llava_1_5_7b": 7_063_427_072,
    "llava_next_mistral_7b": 7_566_747_648,
    "llava_onevision_0_5b": 893_675_552,
    "paligemma_3b_224": 2_923_466_480,
    "gemma3_4b": 4_300_079_472,
    "smolvlm_256m": 256_484_928,
    "internvl3_1b": 938_193_024,
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen3_vl_2b": 2_127_532_032,
    "mistral_small_3_1_24b": 24_011_361_280,
    "fuyu_8b": 9_408_238_592,
    "llama_3_2_11b_vision": 10_642_941_475,
}
MODEL_TYPES = {
    "gpt2": "gpt2",
    "llama_3_2_1b": "llama",
    "qwen3_0_6b": "qwen3",
    "olmo_2_1b": "olmo2",
    "smollm3_3b": "smollm3",
    "phi_3_mini": "phi3",
    "gemma_2b": "gemma",
    "gemma3_1b": "gemma3_text",
    "llava_1_5_7b": "llava",
    "llava_next_mistral_7b": "llava_next",
    "llava_onevision_0_5b": "llava_onevision",
    "paligemma_3b_224": "paligemma",
    "gemma3_4b": "gemma3",
    "smolvlm_256m": "idefics3",
    "internvl3_1b": "internvl",
    "qwen2_5_vl_3b": "qwen2_5_vl",
    "qwen3_vl_2b": "qwen3_vl",
    "mistral_small_3_1_24b": "mistral3",
    "fuyu_8b": "fuyu",
    "llama_3_2_11b_vision": "mllama",
}


def experiment(name):
    return validate(files.load(str(CONFIGS / f"{name}.py")))


def count(boxes) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(meta.unbox(boxes)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_has_its_published_size(name):
    assert count(abstract_params(experiment(name))) == PARAMETERS[name]


# The family and the size of an encoder as published, and its fields that no decoder uses.
ENCODERS = {
    "siglip2_so400m_qwen3_0_6b": ("siglip_vision_model", 428_256_704, {"pool": "attention"}),
    "dinov3_l16_olmo_2_1b": (
        "dinov3_vit",
        303_129_600,
        {"pool": "class", "mask_token": True},
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_its_public_family_and_has_its_published_size(name):
    model_type, size, unused = ENCODERS[name]
    cfg, family = experiment(name), FAMILIES[model_type]
    cfg = replace(cfg, vision=replace(cfg.vision, **unused))
    assert count(abstract_params(cfg.vision)) == size
    names = {row.tensor for row in family.param_table(cfg.vision)}
    vision = family.config_from_hf(family.config_to_hf(cfg.vision), names)
    assert architecture_fields(replace(cfg, vision=vision)) == architecture_fields(cfg)


def test_siglip2_with_both_towers_has_its_published_size():
    sizes = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
    }
    text = sizes | {"vocab_size": 256_000}
    for model_type, vision, size in (
        ("siglip", {"image_size": 384, "patch_size": 14}, 1_136_008_498),
        ("siglip2", {}, 1_135_670_962),
    ):
        config = {"text_config": text, "vision_config": sizes | vision}
        cfg = FAMILIES[model_type].config_from_hf(config, ())
        assert count(abstract_params(cfg)) == size


def test_parts_that_were_never_trained_together_have_theirs():
    boxes = abstract_params(experiment("clip_l14_336_gpt2"))
    assert count(boxes["vision"]) == 303_507_456
    assert count(boxes["decoder"]) == PARAMETERS["gpt2"]


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_config_is_its_public_family(name):
    """The family writes and reads the same model."""
    cfg, family = experiment(name), FAMILIES[MODEL_TYPES[name]]
    names = {row.tensor for row in family.param_table(cfg)}
    assert architecture_fields(
        family.config_from_hf(family.config_to_hf(cfg), names)
    ) == architecture_fields(cfg)
