"""Llama 3.2 1B, text only."""

from vlm_jax.config import (
    Decoder,
    Experiment,
    Fusion,
    Rope,
)

DECODER = Decoder(
    width=2048,
    depth=16,
    heads=32,
    kv_heads=8,
    mlp_width=8192,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    vocab_size=128_256,
    max_positions=131_072,
    rope=Rope(theta=500_000.0, scaling="llama3", factor=32.0, original_positions=8192),
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
