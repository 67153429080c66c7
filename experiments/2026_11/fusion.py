"""Fusion styles: which reads better, and at what cost?

At 64 px a page is one tile, so that hybrid has its tokens both in the sequence and in
cross-attention. Cross-attention has norms of queries and keys, as in Llama 3.2 Vision and as in
this decoder. It has no gates: they protect a trained decoder, and this one learns from scratch
(`placement.py` compares gates and norms).
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from experiments.settings import CROSS, CROSS_ATTENTION
from vlm_jax.study import Study, override


def get_study() -> Study:
    return Study(
        question="Which fusion style reads better, at equal examples and at equal training FLOPs?",
        base=override(get_config(), {"eval.split": "test"}),
        arms={
            "unified": {},
            "cross_attention": CROSS_ATTENTION,
            "hybrid": {"fusion.kind": "hybrid", **CROSS},
            "encoder_decoder": {"fusion.kind": "encoder_decoder", "fusion.qk_norm": True},
            "encoder_free": {"vision.kind": "none"},
        },
        matched={"examples": None, "training_flops": "train.steps"},
        reference="unified",
        quick={"train.steps": 8, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
