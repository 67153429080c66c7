"""BLIP-2 OPT 2.7B: EVA's ViT-g/14, a Q-Former, and OPT 2.7B."""

from configs.published import opt_2_7b
from vlm_jax.config import Experiment, Fusion, Projector, Vision


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=1408,
            depth=39,
            heads=16,
            mlp_width=6144,
            norm_eps=1e-6,
            activation="gelu",
            image_size_px=224,
            image_mean=(0.48145466, 0.4578275, 0.40821073),
            image_std=(0.26862954, 0.26130258, 0.27577711),
            patch_size_px=14,
            class_token=True,
            keep_class_token=True,
        ),
        projector=Projector(
            "qformer",
            queries=32,
            depth=12,
            width=768,
            heads=12,
            block_mlp_width=3072,
            qk_norm=False,
            norm_eps=1e-12,
            cross_every=2,
            block_activation="gelu",
        ),
        fusion=Fusion("unified"),
        decoder=opt_2_7b.DECODER,
    )
