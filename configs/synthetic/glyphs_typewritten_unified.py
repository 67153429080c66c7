"""Unified embedding decoder (method A) on typewritten pages.

It learns to read within minutes and is the base of the studies.
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
        data=Data(source="glyphs", cell_px=8, text_length=116, augment=()),
        vision=Vision(
            width=96, mlp_width=384, depth=3, activation="relu2", positions="sincos", unroll=3
        ),
        projector=Projector(kind="pixel_shuffle", factor=2),
        fusion=Fusion(kind="unified"),
        decoder=Decoder(  # a small Llama with norms of queries and keys
            width=96,
            mlp_width=256,
            depth=4,
            norm="rmsnorm",
            activation="silu",
            gated_mlp=True,
            qk_norm="head",
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            vocab_size=300,
            unroll=4,
        ),
        optim=Optim(kind="muon", learning_rate=3e-3, warmup_steps=50),
        train=Train(steps=600, batch_size=32),
        eval=Eval(split="validation", max_examples=2000, max_new_tokens=24),
    )
