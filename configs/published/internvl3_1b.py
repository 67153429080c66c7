"""InternVL3 1B: InternViT 300M, 2 x 2 patches to one token, and Qwen2.5 0.5B."""

from vlm_jax.config import Decoder, Experiment, Fusion, Projector, Rope, Vision


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=1024,
            depth=24,
            heads=16,
            mlp_width=4096,
            activation="gelu",
            layer_scale="vector",
            image_size_px=448,
            image_mean=(0.485, 0.456, 0.406),
            image_std=(0.229, 0.224, 0.225),
            patch_size_px=14,
            class_token=True,
            final_norm="none",
        ),
        projector=Projector("pixel_shuffle", norm="layernorm", norm_eps=1e-5, projection="mlp"),
        fusion=Fusion("unified"),
        decoder=Decoder(
            width=896,
            depth=24,
            heads=14,
            kv_heads=2,
            mlp_width=4864,
            norm="rmsnorm",
            activation="silu",
            gated_mlp=True,
            out_bias=False,
            mlp_bias=False,
            vocab_size=151_674,
            max_positions=32_768,
            rope=Rope(theta=1_000_000.0, scaling="dynamic", factor=2.0),
            tie_word_embeddings=False,
        ),
    )
