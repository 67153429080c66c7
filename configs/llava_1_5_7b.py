"""LLaVA 1.5 7B (Liu et al. 2023): CLIP's tokens before the last block, an MLP, Vicuna."""

import clip_l14_336_gpt2

from vlm_jax.config import Decoder, Experiment, Fusion, Projector

DECODER = Decoder(
    width=4096,
    depth=32,
    heads=32,
    mlp_width=11_008,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    vocab_size=32_064,
    max_positions=4096,
    tied_head=False,
)


def get_config() -> Experiment:
    vision = clip_l14_336_gpt2.VISION
    return Experiment(vision=vision, projector=Projector("mlp"), fusion=Fusion("unified"), decoder=DECODER)
