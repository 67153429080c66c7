"""Phi-3 mini, 4k context: the text decoder alone."""

from vlm_jax.config import Decoder, Experiment, Fusion

DEPTH = 32
DECODER = Decoder(
    width=3072,
    depth=DEPTH,
    heads=32,
    mlp_width=8192,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    vocab_size=32_064,
    max_positions=4096,
    sliding_window=2047,
    sliding_layers=tuple(range(DEPTH)),
    tied_head=False,
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
