"""Replication of `flip.py` and of `reading.py` on scenes of real handwritten digits.

A scene as text is a grid of digits, so that a decoder can be pretrained on it. Images of digits in
the test split, fold 1, are in no scene that anything was trained on or chosen by. To find a digit
is to read here: `locate_corner` stands for documents, `count` for general questions.
"""

from experiments.flip import ARMS, CANDIDATES, CONTRASTS
from experiments.settings import QUICK, TEXT, base, prerequisites
from vlm_jax.study import Contrast, Study

FINDING = "cross_trained@nats_by_type.locate_corner - unified_trained@nats_by_type.locate_corner"
COUNTING = "cross_trained@nats_by_type.count - unified_trained@nats_by_type.count"


def get_study() -> Study:
    # Digits are found later than letters are read.
    fields = {"data.source": "digits", "data.cell_px": None, "train.steps": 800}
    return Study(
        question="Do the flip, and the lead of unified in reading, hold for handwritten digits?",
        base=base(fields),
        arms=ARMS,
        matched={"examples": None},
        reference="unified_frozen",
        seeds=5,
        metric="nats",
        contrasts={
            **CONTRASTS,
            "not_counting": Contrast(
                f"({FINDING}) - ({COUNTING})", "> 0", "NVLM, table 7: DocVQA +9.7, VQAv2 +0.2"
            ),
        },
        tune=CANDIDATES,
        prerequisites=prerequisites(eye_steps=800),
        probes={"text": TEXT},
        quick=QUICK,
    )
