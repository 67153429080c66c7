"""SmolLM3 3B, text only."""

from vlm_jax.config import Decoder, Experiment, Fusion, Rope

DEPTH = 36
DECODER = Decoder(
    width=2048,
    depth=DEPTH,
    heads=16,
    kv_heads=4,
    mlp_width=11_008,
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    vocab_size=128_256,
    max_positions=65_536,
    rope=Rope(theta=5_000_000.0),
    no_rope_layers=tuple(range(3, DEPTH, 4)),
)


def get_config() -> Experiment:
    return Experiment(fusion=Fusion("text_only"), decoder=DECODER)
