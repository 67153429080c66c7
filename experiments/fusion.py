"""Which fusion style reads better, and what does it cost?

At 64 px a page is one tile: hybrid has its tokens in the sequence and reads them by cross-attention besides.
Cross-attention has norms of its queries and keys, as in Llama 3.2 Vision and as in this decoder. There are no gates:
they protect a decoder that can speak already, and this one learns from nothing (`placement.py` has gates and norms).
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from vlm_jax.study import Study, changed

CROSS = {"fusion.gated": False, "fusion.qk_norm": True}


def get_study() -> Study:
    return Study(
        question="Which fusion style reads better, at the same examples and at the same training FLOPs?",
        base=changed(get_config(), {"eval.split": "test"}),
        arms={
            "unified": {},
            "cross_attention": {"fusion.kind": "cross_attention", **CROSS},
            "hybrid": {"fusion.kind": "hybrid", **CROSS},
            "encoder_decoder": {"fusion.kind": "encoder_decoder", "fusion.qk_norm": True},
            "encoder_free": {"vision.kind": "none"},
        },
        matched={"examples": "", "training_flops": "train.steps"},
        reference="unified",
        quick={"train.steps": 8, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
