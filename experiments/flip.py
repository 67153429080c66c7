"""Fusion styles between frozen and between trained parts: does the ranking of A and B flip?

After Idefics2 (Laurencon et al. 2024, arXiv 2405.02246, table 3). An image token is half a letter.
`settings.py` has the pretrained parts, the test split and the candidates of the learning rates.
"""

from experiments.settings import (
    ALL_PARTS,
    CROSS_ATTENTION,
    FROZEN,
    NEW_PARTS,
    QUICK,
    TEXT,
    base,
    prerequisites,
)
from vlm_jax.study import Contrast, Study

ARMS = {
    "unified_frozen": FROZEN,
    "cross_frozen": CROSS_ATTENTION | FROZEN,
    "unified_trained": {},
    "cross_trained": CROSS_ATTENTION,
}
CANDIDATES = {
    "unified_frozen": NEW_PARTS,
    "cross_frozen": NEW_PARTS,
    "unified_trained": ALL_PARTS,
    "cross_trained": ALL_PARTS,
}
CONTRASTS = {
    "frozen": Contrast("unified_frozen - cross_frozen", "> 0", "Idefics2, table 3: +6.4"),
    "trained": Contrast("cross_trained - unified_trained", "> 0", "Idefics2, table 3: +2.2 (LoRA)"),
}


def get_study() -> Study:
    return Study(
        question="Does the ranking of A and B flip when encoder and decoder are frozen?",
        base=base(),
        arms=ARMS,
        matched={"examples": None},
        reference="unified_frozen",
        seeds=6,
        metric="nats",
        contrasts=CONTRASTS,
        tune=CANDIDATES,
        prerequisites=prerequisites(),
        probes={"text": TEXT},
        loss_threshold=0.5,
        quick=QUICK,
    )
