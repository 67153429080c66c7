"""Placement of cross-attention, and gates on a frozen and on a new decoder.

After Flamingo (Alayrac et al. 2022, arXiv 2204.14198, table 3) and CASA (2025, arXiv 2512.19535,
table 5a). A gate is one number, which Adam moves by about the learning rate a step, so that gated
arms also choose between that rate and ten times it. The encoder is frozen in the four arms with and
without gates. A new decoder has a tokenizer of its own: compare it with another in differences
alone.
"""

from experiments.settings import (
    CROSS_ATTENTION,
    FROZEN,
    NEW_PARTS,
    PARTS_AT_A_THIRD,
    QUICK,
    base,
    prerequisites,
)
from vlm_jax.study import Contrast, Study

GATED = {"fusion.gated": True}
NEW_DECODER = {"decoder.checkpoint": "", "optim.lr_mult.vision": 0.0}
GATED_PARTS = [{**rates, "optim.gate_lr_mult": gate} for rates in NEW_PARTS for gate in (1.0, 10.0)]
ARMS = {
    "every": {},
    "every_2nd": {"fusion.cross_every": 2},
    "once": {"fusion.cross_layers": (2,)},
    "frozen": FROZEN,
    "frozen_gated": FROZEN | GATED,
    "new": NEW_DECODER,
    "new_gated": NEW_DECODER | GATED,
}


def get_study() -> Study:
    return Study(
        question="How many cross-attention layers does reading need, and when do gates help?",
        base=base({"train.steps": 600}),
        arms={name: CROSS_ATTENTION | overrides for name, overrides in ARMS.items()},
        matched={"examples": None},
        reference="every",
        seeds=5,
        metric="nats",
        contrasts={
            "once": Contrast("once - every", "> 0", "Flamingo, table 3: 59.8 against 70.7"),
            "every_2nd": Contrast(
                "every_2nd - every", "= 0", "Flamingo, table 3: 68.2 against 70.7", margin=0.1
            ),
            "gates": Contrast(
                "(frozen - frozen_gated) - (new - new_gated)",
                "> 0",
                "Flamingo, table 3: gates +4.2 on a frozen decoder",
            ),
        },
        tune={
            **dict.fromkeys(("every", "every_2nd", "once"), PARTS_AT_A_THIRD),
            **dict.fromkeys(("frozen", "new"), NEW_PARTS),
            **dict.fromkeys(("frozen_gated", "new_gated"), GATED_PARTS),
        },
        prerequisites=prerequisites(),
        loss_threshold=0.5,
        quick=QUICK,
    )
