"""LLaVA-NeXT (1.6) with Mistral 7B: LLaVA's parts, and a map of up to four tiles."""

from dataclasses import replace

from configs.published import clip_l14_336_gpt2, llava_1_5_7b
from vlm_jax.config import Experiment, Fusion, Projector, Rope

DECODER = replace(
    llava_1_5_7b.DECODER,
    kv_heads=8,
    mlp_width=14_336,
    max_positions=32_768,
    rope=Rope(theta=1_000_000.0),
)


def get_config() -> Experiment:
    vision = replace(
        clip_l14_336_gpt2.VISION,
        resize="pad",
        tiles=4,
        tile_grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    )
    return Experiment(
        vision=vision, projector=Projector("mlp"), fusion=Fusion("unified"), decoder=DECODER
    )
