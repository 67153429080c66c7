"""Qwen3 0.6B, text only."""

from vlm_jax.config import Decoder, Experiment, Fusion, Rope

DECODER = Decoder(
    width=1024,
    depth=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    mlp_width=3072,
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm="head",
    vocab_size=151_936,
    max_positions=40_960,
    rope=Rope(theta=1_000_000.0),
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
