"""Where should cross-attention stand, and what do gates and norms do? After Flamingo's Table 3 (Alayrac et al. 2022).

Flamingo's decoder could speak already and was frozen; this one has eight layers and learns from nothing. `freezing.py`
has the gate on a decoder that was trained before. Embeddings are scaled as Gemma's: beside vectors as small as they are
initialized, what a gate lets through in its first steps is large, and gated arms do not learn.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from experiments.fusion import CROSS
from vlm_jax.study import Study, changed


def get_study() -> Study:
    fields = {
        "eval.split": "test",
        "fusion.kind": "cross_attention",
        **CROSS,
        "decoder.depth": 8,
        "decoder.unroll": 8,
        "decoder.embed_scale": True,
    }
    return Study(
        question="How many layers of cross-attention does reading need, and do gates and norms help?",
        base=changed(get_config(), fields),
        arms={
            "every": {},
            "every_2nd": {"fusion.cross_every": 2},
            "every_4th": {"fusion.cross_every": 4},
            "once": {"fusion.cross_layers": (4,)},
            "every_gated": {"fusion.gated": True},
            "every_no_qk_norm": {"fusion.qk_norm": False},
        },
        matched={"examples": ""},
        reference="every",
        quick={"train.steps": 6, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
