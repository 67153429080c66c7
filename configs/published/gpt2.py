"""GPT-2 (Radford et al. 2019), 124 M, text only."""

from vlm_jax.config import Decoder, Experiment, Fusion

DECODER = Decoder(
    width=768,
    depth=12,
    heads=12,
    mlp_width=3072,
    norm_eps=1e-5,
    vocab_size=50257,
    positions="learned",
    max_positions=1024,
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
