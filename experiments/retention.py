"""Text skill after training on images: what is lost, and does text among the examples keep it?

After VILA (Lin et al. 2024, arXiv 2312.07533, tables 1, 3 and 4) and NVLM (Dai et al. 2024, table
8). The score is of the decoder alone, on pages given as text. Frozen, it is the decoder before, bit
for bit (`tests/train/test_initial.py`, `tests/nn/test_vlm.py`), so that `unified_frozen` has the
skill before the training. Every second row of `unified_rehearsal` is a page as text, without its
image. The four arms of `flip.py` answer the same text questions.
"""

from experiments.flip import ARMS, CANDIDATES
from experiments.settings import QUICK, TEXT, base, prerequisites
from vlm_jax.config import Source
from vlm_jax.study import Contrast, Study

HALF_TEXT = (Source("pages", weight=1.0), Source("text", weight=1.0, transcript=True))


def get_study() -> Study:
    return Study(
        question="Does training on images cost text skill, and does text among them keep it?",
        base=base(),
        arms={
            "unified_frozen": ARMS["unified_frozen"],
            "unified_trained": ARMS["unified_trained"],
            "unified_rehearsal": {"data.mixture": HALF_TEXT, "eval.source": "pages"},
        },
        matched={"examples": None},
        reference="unified_trained",
        seeds=5,
        metric="nats",
        contrasts={
            "lost": Contrast(
                "unified_trained@text:nats - unified_frozen@text:nats",
                "> 0",
                "VILA, tables 1, 3 and 4: MMLU -17.2 with captions, -5.3 interleaved",
            ),
            "kept": Contrast(
                "unified_trained@text:nats - unified_rehearsal@text:nats",
                "> 0",
                "VILA, tables 1, 3 and 4: MMLU +0.2 with text blended in",
            ),
        },
        tune={
            "unified_frozen": CANDIDATES["unified_frozen"],
            "unified_trained": CANDIDATES["unified_trained"],
            "unified_rehearsal": CANDIDATES["unified_trained"],
        },
        prerequisites=prerequisites(),
        probes={"text": {**TEXT, "data.mixture": (), "eval.source": ""}},
        loss_threshold=0.5,
        quick=QUICK,
    )
