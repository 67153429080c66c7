"""Fuyu 8B: linear projection of patches of 30 px into Persimmon's decoder, without an encoder."""

from vlm_jax.config import (
    Decoder,
    Experiment,
    Fusion,
    Projector,
    Rope,
    Vision,
)


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            kind="none", image_size_px=300, patch_size_px=30, positions="none", newline_token=True
        ),
        projector=Projector("linear"),
        fusion=Fusion("unified"),
        decoder=Decoder(
            width=4096,
            depth=36,
            heads=64,
            mlp_width=16_384,
            norm_eps=1e-5,
            activation="relu2",
            qk_norm="head",
            vocab_size=262_144,
            max_positions=16_384,
            rope=Rope(theta=25_000.0, fraction=0.5),
            tie_word_embeddings=False,
        ),
    )
