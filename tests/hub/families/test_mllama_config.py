"""config.json of Llama 3.2 Vision, of the published sizes: read, written, refused."""

import json

import pytest
from transformers import MllamaConfig

from vlm_jax.config import UserError
from vlm_jax.hub.families.encoders import mllama_vision
from vlm_jax.hub.families.registry import find_family

PUBLISHED = MllamaConfig().to_dict()
INTERMEDIATE_LAYERS = "intermediate_layers_indices"


def changed(part: str, **keys) -> dict:
    return {**PUBLISHED, part: {**PUBLISHED[part], **keys}}


CONFIGS = {
    "published": PUBLISHED,
    "cross layers in a row, first and last": changed(
        "text_config", cross_attention_layers=[0, 7, 8, 9, 39]
    ),
    "fewer tiles": changed(
        "vision_config", max_num_tiles=2, supported_aspect_ratios=[[1, 1], [2, 1]]
    ),
}


def test_layers_of_both_kinds_are_counted_together_and_taps_from_what_enters_the_first():
    cfg = find_family(PUBLISHED, "config.json").config_from_hf(PUBLISHED, ())
    blocks = cfg.fusion.sublayers(cfg.decoder.depth)
    layers = [kind for block in blocks for kind in ("cross", "self") if kind in block]
    assert len(layers) == PUBLISHED["text_config"]["num_hidden_layers"] == 40
    assert [n for n, kind in enumerate(layers) if kind == "cross"] == [3, 8, 13, 18, 23, 28, 33, 38]
    assert cfg.vision.feature_layers == (3, 7, 15, 23, 30)
    assert find_family(PUBLISHED, "", "output").config_from_hf(
        PUBLISHED, ()
    ).vision.feature_layers == (
        4,
        8,
        16,
        24,
        31,
    )


@pytest.mark.parametrize("intermediate_layers", ["input", "output"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_read_as_it_was_written(kind, intermediate_layers):
    """With the keys of transformers 4.x; the written file states its intermediate_layers."""
    family = find_family(CONFIGS[kind], "config.json", intermediate_layers)
    cfg = family.config_from_hf(CONFIGS[kind], ())
    written = json.loads(json.dumps(family.config_to_hf(cfg)))
    assert find_family(written, "config.json").config_from_hf(written, ()) == cfg
    assert (
        written["vision_config"][INTERMEDIATE_LAYERS]
        == PUBLISHED["vision_config"][INTERMEDIATE_LAYERS]
    )
    assert "rope_theta" in written["text_config"]


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("vision_config", "vision_output_dim", 1280),
        ("vision_config", "norm_eps", 1e-6),
        ("vision_config", "num_channels", 1),
        ("vision_config", INTERMEDIATE_LAYERS, [0, 33]),
        ("text_config", "cross_attention_layers", []),
        ("text_config", "tie_word_embeddings", True),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(part, key, value):
    config = changed(part, **{key: value})
    with pytest.raises(UserError, match=key):
        find_family(config, "config.json").config_from_hf(config, ())


def test_other_taps_are_refused_with_those_that_there_are():
    with pytest.raises(UserError, match="input, output"):
        find_family(PUBLISHED, "config.json", "middle")


@pytest.mark.parametrize("key, value", [("max_num_tiles", 10**7), ("num_global_layers", 0)])
def test_sizes_that_no_encoder_has_are_refused_at_once(key, value):
    with pytest.raises(UserError, match="tiles is 10000000|num_global_layers is 0"):
        mllama_vision.vision_from_hf({key: value}, "input")
