"""Llama and its relatives, Mistral to SmolLM3: outputs equal to transformers', exact export."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.hub.parity import SMALL
from tests.hub.unified import DecoderLaws, Pair
from vlm_jax.config import UserError
from vlm_jax.hub.families.decoders import smollm3

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 16}


class TestLlama(DecoderLaws):
    MODELS = {
        "llama": (LlamaForCausalLM, LlamaConfig(**SMALL)),
        "llama 3.2": (
            LlamaForCausalLM,
            LlamaConfig(**SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True),
        ),
        "llama with biases": (
            LlamaForCausalLM,
            LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, head_dim=16),
        ),
        "mistral": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=4)),
        "mistral without a window": (
            MistralForCausalLM,
            MistralConfig(**SMALL, sliding_window=None),
        ),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
        "qwen2 with a window": (
            Qwen2ForCausalLM,
            Qwen2Config(**SMALL, sliding_window=4, use_sliding_window=True, max_window_layers=1),
        ),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=12, tie_word_embeddings=True)),
        "qwen3 with a window and biases": (
            Qwen3ForCausalLM,
            Qwen3Config(
                **SMALL,
                head_dim=12,
                attention_bias=True,
                sliding_window=4,
                use_sliding_window=True,
                max_window_layers=1,
            ),
        ),
        "olmo 2": (Olmo2ForCausalLM, Olmo2Config(**SMALL)),
        # Its second block has no RoPE, and therefore a window.
        "smollm3": (
            SmolLM3ForCausalLM,
            SmolLM3Config(
                **SMALL,
                pad_token_id=0,
                no_rope_layer_interval=2,
                use_sliding_window=True,
                sliding_window=4,
            ),
        ),
    }
    CACHED = ("mistral", "qwen3", "smollm3")
    LENGTHS = (13, 20)

    def config_keys(self, pair):
        # SmolLM3's default is beyond the vocabulary.
        return {"pad_token_id": 0}

    @pytest.mark.parametrize("change", [0, 1])
    def test_a_stored_head_is_tied_if_it_equals_the_embedding(self, pairs, tmp_path, change):
        """Qwen3's files hold both; transformers unties heads that differ."""
        folder = pairs("qwen3").checkpoint.folder
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        shutil.copy(folder / "config.json", tmp_path)
        model = Qwen3ForCausalLM.from_pretrained(tmp_path)
        pair = Pair.load(model, tmp_path)
        is_tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert pair.cfg.decoder.tie_word_embeddings == is_tied == (not change)


@pytest.mark.parametrize(
    "keys, layers",
    [
        ({}, (3, 7)),
        ({"no_rope_layer_interval": 3}, (2, 5)),
        ({"no_rope_layers": [0, 1, 1, 1, 1, 1, 1, 0, 0, 0]}, (0, 7)),
    ],
)
def test_the_blocks_of_smollm3_without_rope(keys, layers):
    cfg = smollm3.config_from_hf({"num_hidden_layers": 8} | keys, ())
    assert cfg.decoder.no_rope_layers == layers


@pytest.mark.parametrize("flags", [[1, 0], [1, 2, 1], "111", [True, None, True]])
def test_flags_of_rope_that_do_not_fit_the_blocks_are_refused(flags):
    with pytest.raises(UserError, match="no_rope_layers is .* for each of the 3 layers"):
        smollm3.config_from_hf({"num_hidden_layers": 3, "no_rope_layers": flags}, ())
