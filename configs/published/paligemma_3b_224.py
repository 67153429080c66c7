"""PaliGemma 3B at 224 px (Beyer et al. 2024): SigLIP so400m, a linear projector, Gemma.

Attention over image and prompt is bidirectional.
"""

from dataclasses import replace

from configs.published import gemma_2b
from vlm_jax.config import (
    Data,
    Experiment,
    Fusion,
    Projector,
    Vision,
)


def get_config() -> Experiment:
    return Experiment(
        data=Data(questions_per_row=1),
        vision=Vision(
            width=1152,
            depth=27,
            heads=16,
            mlp_width=4304,
            image_size_px=224,
            patch_size_px=14,
        ),
        projector=Projector("linear"),
        fusion=Fusion("unified", prefix="bidirectional"),
        decoder=replace(gemma_2b.DECODER, vocab_size=257_216),
    )
