"""Gemma, Gemma 2 and Gemma 3: outputs equal to transformers', exact export."""

import pytest
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

from tests.hub.parity import SMALL
from tests.hub.unified import DecoderLaws
from vlm_jax.config import UserError
from vlm_jax.hub.families.decoders import gemma

TEXT = SMALL | {
    "head_dim": 12,
    "pad_token_id": 0,
}  # heads of 12 numbers, where the width would give 8
UNTIED = {"tie_word_embeddings": False, "num_key_value_heads": 1}
LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
SCALE = {"query_pre_attn_scalar": 20}
MODELS = {
    "gemma": (GemmaForCausalLM, GemmaConfig(**TEXT)),
    "gemma, untied, one kv head": (
        GemmaForCausalLM,
        GemmaConfig(**TEXT | UNTIED, attention_bias=True),
    ),
    "gemma 2": (
        Gemma2ForCausalLM,
        Gemma2Config(**TEXT, **SCALE, sliding_window=4, attn_logit_softcapping=2.0),
    ),
    "gemma 2, untied, no softcaps": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **TEXT | UNTIED,
            sliding_window=4,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
    ),
    "gemma 3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**TEXT, **SCALE, sliding_window=4, rope_parameters=LINEAR),
    ),
    "gemma 3, untied, types of its own": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **TEXT | UNTIED,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            final_logit_softcapping=3.0,
            attn_logit_softcapping=1.0,
        ),
    ),
}


class TestGemma(DecoderLaws):
    MODELS = MODELS
    # With sliding windows, two rotations and softcaps.
    CACHED = ("gemma 3, untied, types of its own",)
    ATOL = 3e-4

    def config_keys(self, pair):
        return {"pad_token_id": 0}


def test_the_spelling_of_transformers_4_means_the_same():
    old = TEXT | SCALE | {"sliding_window": 4, "rope_theta": 1000.0, "rope_local_base_freq": 50.0}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    cfg = gemma.GEMMA3.config_from_hf(MODELS["gemma 3"][1].to_dict(), ())
    assert gemma.GEMMA3.config_from_hf(old, ()) == cfg
    written = gemma.GEMMA3.config_to_hf(cfg)
    assert written | old == written | {"pad_token_id": 0}


@pytest.mark.parametrize(
    ("every", "local"), [(1, ()), (2, (0, 2, 4, 6)), (6, (0, 1, 2, 3, 4, 6)), (9, tuple(range(7)))]
)
def test_gemma_3_slides_but_for_every_nth_block(every, local):
    config = TEXT | {"num_hidden_layers": 7, "sliding_window_pattern": every}
    cfg = gemma.GEMMA3.config_from_hf(config, ())
    assert cfg.decoder.sliding_layers == local
    written = gemma.GEMMA3.config_to_hf(cfg)
    by_pattern, by_types = written.copy(), written.copy()
    del by_pattern["layer_types"], by_types["sliding_window_pattern"]
    assert (
        gemma.GEMMA3.config_from_hf(by_pattern, ())
        == gemma.GEMMA3.config_from_hf(by_types, ())
        == cfg
    )


def test_gemma_2_slides_in_every_other_block():
    assert gemma.GEMMA2.config_from_hf(
        TEXT | {"num_hidden_layers": 5}, ()
    ).decoder.sliding_layers == (
        0,
        2,
        4,
    )


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_pytorch_tanh"])
def test_gelu_in_the_first_files_means_the_approximation(activation):
    assert (
        gemma.GEMMA.config_from_hf({**TEXT, "hidden_act": activation}, ()).decoder.activation
        == "gelu_tanh"
    )
    assert gemma.GEMMA.config_from_hf(TEXT, ()).decoder.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (
            {"layer_types": ["sliding_attention"]},
            "layer_types has 1 entries, but num_hidden_layers is 3",
        ),
        (
            {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            "chunked_attention.* .choose from sliding",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type 'linear'",
        ),
    ],
)
def test_what_is_not_supported_is_refused(change, words):
    with pytest.raises(UserError, match=f"config.json.*{words}"):
        gemma.GEMMA3.config_from_hf(TEXT | change, ())
