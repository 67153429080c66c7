"""OPT: outputs equal to transformers', exact export."""

import pytest
from transformers import OPTConfig, OPTForCausalLM, OPTModel

from tests.hub.unified import DecoderLaws, new_pair
from vlm_jax.config import UserError
from vlm_jax.hub.families.decoders import opt

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 32,
    "eos_token_id": None,
}


class TestOpt(DecoderLaws):
    MODELS = {"as published": (OPTForCausalLM, OPTConfig(**TEXT))}
    CACHED = ("as published",)
    SEED = 4


OTHER = {"do_layer_norm_before": False, "enable_bias": False, "tie_word_embeddings": False}
OTHER |= {"activation_function": "gelu"}


@pytest.mark.parametrize("settings", [OTHER, {"_remove_final_layer_norm": True}])
def test_other_settings_have_all_their_tensors(settings, tmp_path):
    pair = new_pair(OPTForCausalLM(OPTConfig(**TEXT | settings)), tmp_path)
    written = opt.config_to_hf(pair.cfg)
    assert {key: written[key] for key in settings} == settings
    assert not pair.cfg.decoder.final_norm


def test_a_model_without_a_head_has_the_tied_one(tmp_path):
    assert new_pair(OPTModel(OPTConfig(**TEXT)), tmp_path).cfg.decoder.tie_word_embeddings


@pytest.mark.parametrize(
    "change", [{"word_embed_proj_dim": 16}, {"layer_norm_elementwise_affine": False}]
)
def test_unsupported_settings_are_refused(change):
    with pytest.raises(UserError, match=f"config.json: {next(iter(change))}"):
        opt.config_from_hf(TEXT | change, ())
