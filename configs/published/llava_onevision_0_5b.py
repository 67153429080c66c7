"""LLaVA-OneVision 0.5B (Li et al. 2024): SigLIP so400m, an MLP, and Qwen2 0.5B.

An image has up to 36 tiles; its map is resized to about the tokens of nine.
"""

import itertools

from vlm_jax.config import Decoder, Experiment, Fusion, Projector, Rope, Vision


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=1152,
            depth=26,
            heads=16,
            mlp_width=4304,
            image_size_px=384,
            patch_size_px=14,
            # It drops the border of 6 px, which is not a whole patch.
            patch_embed="conv",
            feature_layers=(-1,),
            resize="pad",
            tiles=36,
            tile_grids=tuple(itertools.product(range(1, 7), repeat=2)),
            max_map_tiles=9,
        ),
        projector=Projector("mlp"),
        fusion=Fusion("unified"),
        decoder=Decoder(
            width=896,
            depth=24,
            heads=14,
            kv_heads=2,
            mlp_width=4864,
            norm="rmsnorm",
            activation="silu",
            gated_mlp=True,
            out_bias=False,
            mlp_bias=False,
            vocab_size=152_000,
            max_positions=32_768,
            rope=Rope(theta=1_000_000.0),
        ),
    )
