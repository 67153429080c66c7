"""Phi-3 mini with 4k context, text only."""

from dataclasses import replace

from configs.published import llama_3_2_1b
from vlm_jax.config import (
    Decoder,
    Experiment,
    Fusion,
    Rope,
)

DEPTH = 32
DECODER: Decoder = replace(
    llama_3_2_1b.DECODER,
    width=3072,
    depth=DEPTH,
    kv_heads=None,
    vocab_size=32_064,
    max_positions=4096,
    rope=Rope(),
    sliding_window=2047,
    sliding_layers=tuple(range(DEPTH)),
    tie_word_embeddings=False,
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
