"""Fusion styles between frozen and between trained parts: does the ranking of A and B flip?

After Idefics2 (Laurencon et al. 2024, arXiv 2405.02246, table 3). Each seed trains a decoder on the
text of pages, and an encoder that reads pages to a new decoder: in half of the seeds in its
sequence, in the others by cross-attention. Its arms start from these two. An image token is half a
letter. The score is nats per answer token: lower is better. Words and font of the test split, fold
1, are in no page that anything was trained on or chosen by.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from experiments.freezing import GEMMA_3
from experiments.fusion import CROSS
from vlm_jax.study import Contrast, Study, override

CROSS_ATTENTION = {"fusion.kind": "cross_attention", **CROSS}
FROZEN = {"optim.lr_mult.vision": 0.0, "optim.lr_mult.decoder": 0.0}
RATES = (1e-3, 3e-3, 1e-2)
NEW_PARTS = [{"optim.learning_rate": rate} for rate in RATES]
ALL_PARTS = [
    {"optim.learning_rate": rate, "optim.lr_mult.vision": part, "optim.lr_mult.decoder": part}
    for rate in RATES
    for part in (0.1, 0.3)
]
# Pages that no arm sees, and nothing of the test split.
FIRST = {"vision.checkpoint": "", "decoder.checkpoint": "", "data.seed": 25}
FIRST |= {"eval.split": "validation"}
TEXT = {"fusion.kind": "text_only", "data.transcript": True, "data.text_length": 240}


def get_study() -> Study:
    fields = {
        "data.fold": 1,
        "data.seed": 24,
        "eval.split": "test",
        "eval.max_examples": 1000,
        "eval.metrics": ("nats", "exact_match"),
        "projector.kind": "mlp",
        "vision.checkpoint": "{eye}",
        "decoder.checkpoint": "{text}",
        "train.steps": 400,
    }
    eye = {**FIRST, "projector.kind": "linear"}
    return Study(
        question="Does the ranking of A and B flip when encoder and decoder are frozen?",
        base=override(get_config(), GEMMA_3 | fields),
        arms={
            "unified_frozen": FROZEN,
            "cross_frozen": CROSS_ATTENTION | FROZEN,
            "unified_trained": {},
            "cross_trained": CROSS_ATTENTION,
        },
        matched={"examples": None},
        reference="unified_frozen",
        seeds=6,
        metric="nats",
        contrasts={
            "frozen": Contrast("unified_frozen - cross_frozen", "> 0", "Idefics2, table 3: +6.4"),
            "trained": Contrast(
                "cross_trained - unified_trained", "> 0", "Idefics2, table 3: +2.2 (LoRA)"
            ),
        },
        tune={
            "unified_frozen": NEW_PARTS,
            "cross_frozen": NEW_PARTS,
            "unified_trained": ALL_PARTS,
            "cross_trained": ALL_PARTS,
        },
        prerequisites={
            "text": {**FIRST, **TEXT, "train.steps": 500},
            "eye": [eye, eye | CROSS_ATTENTION],
        },
        probes={"text": TEXT},
        loss_threshold=0.5,
        quick={
            "train.steps": 8,
            "data.images": (200, 50, 50),
            "eval.max_examples": 40,
            "eval.batch_size": 40,
            # Compile a loop over layers: faster to compile, slower to run.
            "vision.unroll": 1,
            "decoder.unroll": 1,
        },
    )
