"""Unified embedding decoder (method A) on typewritten pages, which it reads after minutes; the base of the studies."""

from vlm_jax.config import Data, Decoder, Eval, Experiment, Fusion, Optim, Projector, Train, Vision

SMALL = {"width": 96, "heads": 4, "mlp_width": 384, "activation": "relu2", "unroll": 3}


def get_config() -> Experiment:
    return Experiment(
        data=Data(source="glyphs", cell_px=8, text_length=116, augment=()),
        vision=Vision(**SMALL, depth=3, positions="sincos"),
        projector=Projector(kind="linear"),
        fusion=Fusion(kind="unified"),
        decoder=Decoder(**SMALL, depth=3, vocab_size=300),
        optim=Optim(kind="muon", learning_rate=2e-3, warmup_steps=50),
        train=Train(steps=600, batch_size=32),
        eval=Eval(split="validation", max_examples=2000),
    )
