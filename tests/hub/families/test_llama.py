"""Llama, Mistral and Qwen2: our logits are those of transformers, and what is exported is what was loaded."""

import numpy as np
import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.hub.parity import SMALL, assert_round_trip, ours, reference, reloaded, saved

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 16}
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
    "mistral without a window": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
    "qwen2 with a window": (
        Qwen2ForCausalLM,
        Qwen2Config(**SMALL, sliding_window=4, use_sliding_window=True, max_window_layers=1),
    ),
}
IDS = np.random.default_rng(0).integers(0, 64, (2, 20))
every_model = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture
def model(kind, tmp_path):
    cls, config = MODELS[kind]
    return saved(cls(config), tmp_path / "hub")


@every_model
def test_logits_are_those_of_transformers(model, tmp_path, kind):
    padded_left, padded_right = np.ones_like(IDS), np.ones_like(IDS)
    padded_left[0, :5], padded_right[1, 13:] = 0, 0
    for mask in (np.ones_like(IDS), padded_left, padded_right):
        expected = reference(model, input_ids=IDS, attention_mask=mask)
        found = ours(tmp_path / "hub", input_ids=IDS, attention_mask=mask)
        np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)


@every_model
def test_an_export_is_what_was_loaded_and_transformers_loads_it(model, tmp_path, kind):
    assert_round_trip(tmp_path / "hub", tmp_path / "ours")
    again = reloaded(MODELS[kind][0], tmp_path / "ours", model)
    np.testing.assert_allclose(
        reference(again, input_ids=IDS), reference(model, input_ids=IDS), atol=1e-6
    )
