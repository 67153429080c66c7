"""Gemma 2B, text only."""

from vlm_jax.config import Decoder, Experiment, Fusion

DECODER = Decoder(
    width=2048,
    depth=18,
    heads=8,
    kv_heads=1,
    head_dim=256,
    mlp_width=16_384,
    norm="rmsnorm_zero_centered",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    vocab_size=256_000,
    embed_scale=True,
    max_positions=8192,
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
