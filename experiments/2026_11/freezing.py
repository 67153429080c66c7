"""Fusion styles with a frozen and with a trained decoder: does the ranking of A and B flip?

After Idefics2 (Laurencon et al. 2024, table 3).

The decoder first learns to answer from the text of the pages, then gets the pages as images. An
image token is a letter, as a token of the text is: a frozen decoder cannot learn to read four
letters from one token. The decoder is a small Gemma 3: at this learning rate a Llama, without its
norms, learns with some seeds only.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from experiments.settings import CROSS_ATTENTION, GEMMA_3
from vlm_jax.study import Study, override

KINDS = {
    "unified": {},
    "cross_attention": CROSS_ATTENTION,
    "cross_attention_gated": {"fusion.kind": "cross_attention", "fusion.gated": True},
}
FROZEN = {"optim.lr_mult.decoder": 0.0}


def get_study() -> Study:
    fields = {
        "eval.split": "test",
        "projector.kind": "linear",
        "decoder.checkpoint": "{text}",
        "train.steps": 400,
    }
    return Study(
        question="Does the ranking of A and B flip when the decoder, trained on text, is frozen?",
        base=override(get_config(), GEMMA_3 | fields),
        arms={
            **{f"{kind}_trained": fusion for kind, fusion in KINDS.items()},
            **{f"{kind}_frozen": fusion | FROZEN for kind, fusion in KINDS.items()},
        },
        matched={"examples": None},
        reference="unified_trained",
        prerequisites={
            "text": {
                "decoder.checkpoint": "",
                "fusion.kind": "text_only",
                "data.transcript": True,
                "data.text_length": 240,
                "train.steps": 500,
            }
        },
        quick={"train.steps": 8, "data.images": (200, 50, 50), "eval.max_examples": 40},
    )
