"""Unified embedding decoder (method A) on easy-VQA: image tokens stand in the decoder's sequence."""

from vlm_jax.config import Data, Decoder, Experiment, Fusion, Projector, Train, Vision


def get_config() -> Experiment:
    return Experiment(
        data=Data(questions_per_row=5, text_length=48),
        vision=Vision(image_size_px=64, patch_size_px=8, width=128, depth=4, positions="sincos", unroll=4),
        projector=Projector(kind="pixel_shuffle", factor=2),
        fusion=Fusion(kind="unified"),
        decoder=Decoder(width=128, depth=2, unroll=2),
        train=Train(steps=3000, batch_size=32),
    )
