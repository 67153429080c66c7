"""Settings that several studies share: pretrained parts, learning rates, the test split, --quick.

Each seed trains a decoder on the text of pages, and an encoder that reads pages to a new decoder:
in half of the seeds in its sequence, in the others by cross-attention. Its arms start from these
two. Words and font of the test split, fold 1, are in no page that anything was trained on or chosen
by. The score is nats per answer token: lower is better.
"""

from configs.synthetic.glyphs_typewritten_unified import get_config
from vlm_jax.config import Experiment
from vlm_jax.study import override
from vlm_jax.study.changes import Overrides

# Cross-attention with norms of queries and keys, as in Llama 3.2 Vision and in the decoder here.
# It has no gates: they keep a trained decoder at first, and several decoders here are new.
CROSS = {"fusion.gated": False, "fusion.qk_norm": True}
CROSS_ATTENTION = {"fusion.kind": "cross_attention", **CROSS}
# A small Gemma 3: at these learning rates a Llama, without its norms, learns with some seeds only.
GEMMA_3 = {
    "decoder.norm": "rmsnorm_zero_centered",
    "decoder.norm_position": "sandwich",
    "decoder.embed_scale": True,
    "decoder.activation": "gelu_tanh",
}
FROZEN = {"optim.lr_mult.vision": 0.0, "optim.lr_mult.decoder": 0.0}

RATES = (1e-3, 3e-3, 1e-2)
NEW_PARTS = [{"optim.learning_rate": rate} for rate in RATES]
# Rates of new parts, with pretrained ones at a tenth or a third of them.
ALL_PARTS = [
    {"optim.learning_rate": rate, "optim.lr_mult.vision": part, "optim.lr_mult.decoder": part}
    for rate in RATES
    for part in (0.1, 0.3)
]
PARTS_AT_A_THIRD = ALL_PARTS[1::2]
# A new encoder beside a pretrained decoder.
NEW_ENCODER = [{"optim.learning_rate": rate, "optim.lr_mult.decoder": 0.3} for rate in RATES]

# Pages that no arm sees, and nothing of the test split.
FIRST = {"vision.checkpoint": "", "decoder.checkpoint": "", "data.seed": 25}
FIRST |= {"eval.split": "validation"}
TEXT = {"fusion.kind": "text_only", "data.transcript": True, "data.text_length": 240}
QUICK = {
    "train.steps": 8,
    "data.images": (200, 50, 50),
    "eval.max_examples": 40,
    "eval.batch_size": 40,
    # Compile a loop over layers: faster to compile, slower to run.
    "vision.unroll": 1,
    "decoder.unroll": 1,
}


def base(fields: Overrides | None = None) -> Experiment:
    """Returns the experiment of arms that start from `prerequisites`, with other fields."""
    shared = {
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
    return override(get_config(), {**GEMMA_3, **shared, **(fields or {})})


def prerequisites(eye_steps: int = 400) -> dict[str, Overrides | list[Overrides]]:
    """Returns the pretrained decoder, `text`, and the encoder, `eye`, of a study.

    They are the same runs in all studies of a dataset if these change no other field of `base`.
    """
    eye = {**FIRST, "projector.kind": "linear", "train.steps": eye_steps}
    return {
        "text": {**FIRST, **TEXT, "train.steps": 500},
        "eye": [eye, {**eye, **CROSS_ATTENTION}],
    }
