"""Llama, Mistral, Qwen2, Qwen3 and OLMo 2: outputs equal to transformers', exact export."""

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
)

from tests.hub.parity import SMALL
from tests.hub.unified import DecoderLaws

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
    }
    CACHED = ("mistral", "qwen3", "olmo 2")
    LENGTHS = (13, 20)
