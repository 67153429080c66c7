"""LLaVA 1.5 7B (Liu et al. 2023): CLIP's tokens before its last block, an MLP, Vicuna."""

from dataclasses import replace

from configs.published import clip_l14_336_gpt2, llama_3_2_1b
from vlm_jax.config import (
    Decoder,
    Experiment,
    Fusion,
    Projector,
    Rope,
)

DECODER: Decoder = replace(
    llama_3_2_1b.DECODER,
    width=4096,
    depth=32,
    kv_heads=None,
    mlp_width=11_008,
    vocab_size=32_064,
    max_positions=4096,
    rope=Rope(),
    tie_word_embeddings=False,
)


def get_config() -> Experiment:
    vision = clip_l14_336_gpt2.VISION
    return Experiment(
        vision=vision, projector=Projector("mlp"), fusion=Fusion("unified"), decoder=DECODER
    )
