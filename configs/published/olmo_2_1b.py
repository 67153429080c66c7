"""OLMo 2 1B (OLMo-2-0425-1B), text only."""

from vlm_jax.config import Decoder, Experiment, Fusion, Rope

DECODER = Decoder(
    width=2048,
    depth=16,
    heads=16,
    mlp_width=8192,
    norm="rmsnorm",
    norm_position="output",
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm="all_heads",
    vocab_size=100_352,
    max_positions=4096,
    rope=Rope(theta=500_000.0),
    tie_word_embeddings=False,
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
