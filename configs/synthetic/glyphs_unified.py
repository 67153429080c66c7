"""Unified embedding decoder (method A) that reads words on generated pages.

Its settings were chosen on the validation split.
"""

from vlm_jax.config import (
    Data,
    Decoder,
    Eval,
    Experiment,
    Fusion,
    Optim,
    Projector,
    Train,
    Vision,
)


def get_config() -> Experiment:
    return Experiment(
        data=Data(source="glyphs", text_length=128, augment=()),
        vision=Vision(depth=4, activation="relu2", positions="sincos", unroll=4),
        projector=Projector(kind="linear"),
        fusion=Fusion(kind="unified"),
        decoder=Decoder(depth=3, activation="relu2", unroll=3, vocab_size=320),
        optim=Optim(kind="muon", learning_rate=1e-3),
        train=Train(steps=3000, batch_size=64),
        eval=Eval(split="validation", max_new_tokens=24),
    )
