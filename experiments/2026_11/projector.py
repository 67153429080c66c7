"""Connectors at an equal count of image tokens: does the choice matter?

MM1 (McKinzie et al. 2024, section 3.2) and PaliGemma (Beyer et al. 2024) found that it hardly does.
linear and mlp keep the encoder's tokens, so they have patches of 16 px here, and the connectors
that make one token of four have patches of 8 px.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from vlm_jax.study import Study, override


def get_study() -> Study:
    return Study(
        question="Does the connector matter at an equal count of image tokens?",
        base=override(get_config(), {"eval.split": "test", "projector.queries": 16}),
        arms={
            "pixel_shuffle": {},
            "average_pool": {"projector.kind": "average_pool"},
            "resampler": {"projector.kind": "resampler"},
            "linear": {"projector.kind": "linear", "vision.patch_size_px": 16},
            "mlp": {"projector.kind": "mlp", "vision.patch_size_px": 16},
        },
        matched={"image_tokens": None},
        reference="pixel_shuffle",
        quick={"train.steps": 8, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
