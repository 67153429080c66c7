"""Llama 3.2 11B Vision: tiled two-stage encoder, gated cross-attention.

Cross-attention comes before every fourth decoder block.
"""

from dataclasses import replace

from configs.published import llama_3_2_1b
from vlm_jax.config import (
    Experiment,
    Fusion,
    Projector,
    Rope,
    Vision,
)

TILES = 4
VISION = Vision(
    width=1280,
    depth=32,
    heads=16,
    mlp_width=5120,
    norm_eps=1e-5,
    activation="gelu",
    qkv_bias=False,
    out_bias=False,
    image_size_px=448,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    patch_size_px=14,
    patch_bias=False,
    class_token=True,
    keep_class_token=True,
    pre_norm=True,
    feature_layers=(3, 7, 15, 23, 30),
    tiles=TILES,
    tile_layouts=tuple(
        (rows, n // rows) for rows in range(1, TILES + 1) for n in range(rows, TILES + 1, rows)
    ),
    num_global_layers=8,
)


def get_config() -> Experiment:
    decoder = replace(
        llama_3_2_1b.DECODER,
        width=4096,
        depth=32,
        mlp_width=14_336,
        extra_tokens=8,
        rope=Rope(theta=500_000.0, scaling="llama3", factor=8.0, original_positions=8192),
        tie_word_embeddings=False,
    )
    return Experiment(
        vision=VISION,
        projector=Projector("linear"),
        fusion=Fusion(
            kind="cross_attention",
            cross_layers=tuple(range(3, 32, 4)),
            gated=True,
            qk_norm=True,
            tokens_without_image="attend_all",
        ),
        decoder=decoder,
    )
