"""Where should cross-attention stand, and does its gate matter? After Flamingo's Table 3 (Alayrac et al. 2022)."""

from configs.glyphs_typewritten_unified import get_config
from vlm_jax.study import Study, changed


def get_study() -> Study:
    fields = {
        "eval.split": "test",
        "fusion.kind": "cross_attention",
        "decoder.depth": 8,
        "decoder.unroll": 8,
    }
    return Study(
        question="How many layers of cross-attention does reading need, and do their gates help?",
        base=changed(get_config(), fields),
        arms={
            "every": {},
            "every_2nd": {"fusion.cross_every": 2},
            "every_4th": {"fusion.cross_every": 4},
            "once": {"fusion.cross_layers": (4,)},
            "every_no_gate": {"fusion.gated": False},
            "once_no_gate": {"fusion.cross_layers": (4,), "fusion.gated": False},
        },
        matched={"examples": ""},
        reference="every",
        quick={"train.steps": 6, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
