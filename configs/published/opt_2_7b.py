"""OPT 2.7B."""

from vlm_jax.config import Decoder, Experiment, Fusion

DECODER = Decoder(
    width=2560,
    depth=32,
    heads=32,
    mlp_width=10_240,
    norm_eps=1e-5,
    activation="relu",
    vocab_size=50_272,
    positions="learned",
    max_positions=2048,
    position_offset=2,
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
