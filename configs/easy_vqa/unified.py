"""Unified embedding decoder (method A) on easy-VQA: image tokens in the decoder's sequence."""

from vlm_jax.config import (
    Data,
    Decoder,
    Experiment,
    Fusion,
    Optim,
    Projector,
    Train,
    Vision,
)


def get_config() -> Experiment:
    return Experiment(
        data=Data(questions_per_row=8, text_length=72, augment=("mirror", "shift")),
        vision=Vision(depth=4, activation="relu2", positions="sincos", unroll=4),
        projector=Projector(kind="pixel_shuffle", factor=2),
        fusion=Fusion(kind="unified"),
        decoder=Decoder(depth=3, activation="relu2", unroll=3),
        optim=Optim(kind="muon", learning_rate=1e-3),
        train=Train(steps=1000, batch_size=64, checkpoint_every_steps=250),
    )
