"""SmolVLM 256M: SigLIP at 512 px, 4 x 4 patches to one token, and SmolLM2 135M."""

from vlm_jax.config import Decoder, Experiment, Fusion, Projector, Rope, Vision


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=768,
            depth=12,
            heads=12,
            mlp_width=3072,
            image_size_px=512,
            patch_size_px=16,
            resample="lanczos",
        ),
        projector=Projector("pixel_shuffle", factor=4, bias=False),
        fusion=Fusion("unified"),
        decoder=Decoder(
            width=576,
            depth=30,
            heads=9,
            kv_heads=3,
            mlp_width=1536,
            norm="rmsnorm",
            norm_eps=1e-5,
            activation="silu",
            gated_mlp=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            vocab_size=49_280,
            max_positions=8192,
            rope=Rope(theta=100_000.0),
            tie_word_embeddings=False,
        ),
    )
