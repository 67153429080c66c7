"""Gemma 3 1B (Gemma Team 2025), text only.

Five of six blocks have a sliding window and RoPE of their own.
"""

from vlm_jax.config import Decoder, Experiment, Fusion, Rope

DEPTH = 26
DECODER = Decoder(
    width=1152,
    depth=DEPTH,
    heads=4,
    kv_heads=1,
    head_dim=256,
    mlp_width=6912,
    norm="rmsnorm_zero_centered",
    norm_position="sandwich",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm="head",
    vocab_size=262_144,
    embed_scale=True,
    max_positions=32_768,
    rope=Rope(theta=1_000_000.0, local_theta=10_000.0),
    sliding_window=512,
    sliding_layers=tuple(i for i in range(DEPTH) if (i + 1) % 6),
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
