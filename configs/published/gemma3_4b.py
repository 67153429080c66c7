"""Gemma 3 4B (Gemma Team 2025): SigLIP so400m at 896 px, 256 tokens an image, Gemma 3.

Five of six decoder blocks have a sliding window and RoPE of their own.
"""

from vlm_jax.config import Decoder, Experiment, Fusion, Projector, Rope, Vision

DEPTH = 34


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=1152,
            depth=27,
            heads=16,
            mlp_width=4304,
            image_size_px=896,
            patch_size_px=14,
            resample="bilinear",
        ),
        projector=Projector("average_pool", factor=4, norm="rmsnorm_zero_centered", bias=False),
        fusion=Fusion("unified", prefix="bidirectional_images"),
        decoder=Decoder(
            width=2560,
            depth=DEPTH,
            heads=8,
            kv_heads=4,
            head_dim=256,
            mlp_width=10_240,
            norm="rmsnorm_zero_centered",
            norm_position="sandwich",
            gated_mlp=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            qk_norm="head",
            vocab_size=262_208,
            embed_scale=True,
            max_positions=131_072,
            rope=Rope(theta=1_000_000.0, local_theta=10_000.0, scaling="linear", factor=8.0),
            sliding_window=1024,
            sliding_layers=tuple(i for i in range(DEPTH) if (i + 1) % 6),
        ),
    )
