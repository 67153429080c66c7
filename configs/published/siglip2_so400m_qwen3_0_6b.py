"""SigLIP 2 so400m/16 at 384 px (Tschannen et al. 2025) and Qwen3 0.6B, never trained together.

The weights come from two folders: --vision.checkpoint DIR --decoder.checkpoint DIR.
"""

from configs.published import qwen3_0_6b
from vlm_jax.config import Experiment, Fusion, Projector, Vision

VISION = Vision(
    width=1152,
    depth=27,
    heads=16,
    mlp_width=4304,
    image_size_px=384,
    patch_size_px=16,
    resample="bilinear",
)


def get_config() -> Experiment:
    return Experiment(
        vision=VISION,
        projector=Projector("mlp"),
        fusion=Fusion("unified"),
        decoder=qwen3_0_6b.DECODER,
    )
