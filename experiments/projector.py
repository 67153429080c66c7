"""Does the connector matter, where it hands on as many tokens?

MM1 (McKinzie et al. 2024, section 3.2) and PaliGemma (Beyer et al. 2024) found: hardly. linear and mlp keep the
encoder's tokens, so here its patches are 16 px for them and 8 px for those that make one token of four.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from vlm_jax.study import Study, changed


def get_study() -> Study:
    return Study(
        question="Does the connector matter at an equal count of image tokens?",
        base=changed(get_config(), {"eval.split": "test", "projector.queries": 16}),
        arms={
            "pixel_shuffle": {},
            "average_pool": {"projector.kind": "average_pool"},
            "resampler": {"projector.kind": "resampler"},
            "linear": {"projector.kind": "linear", "vision.patch_size_px": 16},
            "mlp": {"projector.kind": "mlp", "vision.patch_size_px": 16},
        },
        matched={"image_tokens": ""},
        reference="pixel_shuffle",
        quick={"train.steps": 8, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
