"""Fusion styles by type of question: is A's lead in dense reading, and only there?

After NVLM (Dai et al. 2024, table 7: DocVQA and VQAv2) and CASA (2025, arXiv 2512.19535, table 2).
An image token is two letters (16 tokens) or half a letter (64). At 16 tokens beside 116 of text
cross-attention costs more FLOPs (`cost.py`), at 64 tokens they are nearly equal. Seconds cannot be
matched with pretrained parts; the report has them beside the scores.
"""

from experiments.settings import CROSS_ATTENTION, PARTS_AT_A_THIRD, QUICK, base, prerequisites
from vlm_jax.study import Contrast, Study

DENSE = {"projector.kind": "pixel_shuffle"}
READING = "cross_16@nats_by_type.read_all - unified_16@nats_by_type.read_all"
COUNTING = "cross_16@nats_by_type.count - unified_16@nats_by_type.count"


def get_study() -> Study:
    arms = {
        "unified_16": DENSE,
        "cross_16": CROSS_ATTENTION | DENSE,
        "unified_64": {},
        "cross_64": CROSS_ATTENTION,
    }
    return Study(
        question="Does unified read whole pages better than cross-attention, and only these?",
        base=base(),
        arms=arms,
        matched={"examples": None, "training_flops": "train.steps"},
        reference="unified_16",
        seeds=5,
        metric="nats",
        contrasts={
            "reading": Contrast(READING, "> 0", "NVLM, table 7: DocVQA +9.7, OCRBench +25"),
            "reading_at_equal_flops": Contrast(
                READING, "> 0", "NVLM, table 7: DocVQA +9.7", axis="training_flops"
            ),
            "not_counting": Contrast(
                f"({READING}) - ({COUNTING})", "> 0", "NVLM, table 7: DocVQA +9.7, VQAv2 +0.2"
            ),
        },
        tune=dict.fromkeys(arms, PARTS_AT_A_THIRD),
        prerequisites=prerequisites(),
        loss_threshold=0.5,
        quick=QUICK,
    )
