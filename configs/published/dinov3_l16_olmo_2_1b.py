"""DINOv3 ViT-L/16 at 224 px (Siméoni et al. 2025) and OLMo 2 1B, never trained together.

The weights come from two folders: --vision.checkpoint DIR --decoder.checkpoint DIR.
"""

from configs.published import olmo_2_1b
from vlm_jax.config import Experiment, Fusion, PatchRope, Projector, Vision

VISION = Vision(
    width=1024,
    depth=24,
    heads=16,
    mlp_width=4096,
    norm_eps=1e-5,
    activation="gelu",
    key_bias=False,
    layer_scale="vector",
    image_size_px=224,
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
    resample="bilinear",
    patch_size_px=16,
    positions="none",
    rope=PatchRope("same", theta=100.0, coordinates="centered"),
    class_token=True,
    registers=4,
)


def get_config() -> Experiment:
    return Experiment(
        vision=VISION,
        projector=Projector("mlp"),
        fusion=Fusion("cross_attention", cross_every=4, gated=True),
        decoder=olmo_2_1b.DECODER,
    )
