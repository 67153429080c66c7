"""Does the ranking of A and B flip when the decoder is frozen? As in Idefics2 (Laurencon et al. 2024, Table 3).

The decoder first learns to answer from what the pages say, as text; then it gets the pages as images.
"""

from configs.glyphs_typewritten_unified import get_config
from vlm_jax.study import Study, changed


def get_study() -> Study:
    return Study(
        question="Does the ranking of A and B flip when a decoder that was trained on text is frozen?",
        base=changed(get_config(), {"eval.split": "test", "decoder.checkpoint": "{text}"}),
        arms={
            "unified_trained": {},
            "unified_frozen": {"optim.rate_scale.decoder": 0.0},
            "cross_attention_trained": {"fusion.kind": "cross_attention"},
            "cross_attention_frozen": {"fusion.kind": "cross_attention", "optim.rate_scale.decoder": 0.0},
        },
        matched={"examples": ""},
        reference="unified_trained",
        first={
            "text": {
                "decoder.checkpoint": "",
                "fusion.kind": "text_only",
                "data.transcript": True,
                "data.text_length": 240,
                "train.steps": 1500,
            }
        },
        quick={"train.steps": 8, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
