"""CLIP ViT-L/14 at 336 px and GPT-2, unified: parts that were never trained together.

The weights come from two folders: --vision.checkpoint DIR --decoder.checkpoint DIR.
"""

from configs.published import gpt2
from vlm_jax.config import (
    Experiment,
    Fusion,
    Projector,
    Vision,
)

VISION = Vision(
    width=1024,
    depth=24,
    heads=16,
    mlp_width=4096,
    norm_eps=1e-5,
    activation="quick_gelu",
    image_size_px=336,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    patch_size_px=14,
    patch_bias=False,
    class_token=True,
    pre_norm=True,
    final_norm="pooled",
    feature_layers=(-2,),
)


def get_config() -> Experiment:
    return Experiment(
        vision=VISION, projector=Projector("mlp"), fusion=Fusion("unified"), decoder=gpt2.DECODER
    )
