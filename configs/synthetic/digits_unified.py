"""Unified embedding decoder (method A) on scenes of handwritten digits.

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
        data=Data(source="digits", text_length=112, augment=()),
        vision=Vision(depth=4, activation="relu2", positions="sincos", unroll=4),
        projector=Projector(kind="pixel_shuffle", factor=2),
        fusion=Fusion(kind="unified"),
        decoder=Decoder(depth=3, activation="relu2", unroll=3, vocab_size=448),
        optim=Optim(kind="muon", learning_rate=1e-3),
        train=Train(steps=2000, batch_size=64),
        eval=Eval(split="validation"),
    )
