"""Placement, gates and norms of cross-attention, after Flamingo (Alayrac et al. 2022, table 3).

Flamingo's decoder was trained before and frozen; this one has eight layers and learns from scratch.
`freezing.py` has the gate on a trained decoder. Embeddings are scaled as in Gemma: beside vectors
as small as their initialization, a gate's first outputs are large, and gated arms do not learn.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from experiments.settings import CROSS_ATTENTION
from vlm_jax.study import Study, override


def get_study() -> Study:
    fields = {
        "eval.split": "test",
        **CROSS_ATTENTION,
        "decoder.depth": 8,
        "decoder.unroll": 8,
        "decoder.embed_scale": True,
    }
    return Study(
        question="How many cross-attention layers does reading need, and do gates and norms help?",
        base=override(get_config(), fields),
        arms={
            "every": {},
            "every_2nd": {"fusion.cross_every": 2},
            "every_4th": {"fusion.cross_every": 4},
            "once": {"fusion.cross_layers": (4,)},
            "every_gated": {"fusion.gated": True},
            "every_no_qk_norm": {"fusion.qk_norm": False},
        },
        matched={"examples": None},
        reference="every",
        quick={"train.steps": 6, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
