"""Mistral Small 3.1 24B: Pixtral's encoder at native resolution, 2 x 2 patches to one token."""

from vlm_jax.config import Decoder, Experiment, Fusion, PatchRope, Projector, Rope, Vision


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=1024,
            depth=24,
            heads=16,
            mlp_width=4096,
            norm="rmsnorm",
            norm_eps=1e-5,
            activation="gelu",
            gated_mlp=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            image_size_px=1540,
            max_patches=12_100,
            patch_square=2,
            image_mean=(0.48145466, 0.4578275, 0.40821073),
            image_std=(0.26862954, 0.26130258, 0.27577711),
            patch_size_px=14,
            patch_bias=False,
            positions="none",
            rope=PatchRope("alternate"),
            pre_norm=True,
            newline_token=True,
        ),
        projector=Projector("pixel_shuffle", merge_linear=True, projection="mlp", bias=False),
        fusion=Fusion("unified"),
        decoder=Decoder(
            width=5120,
            depth=40,
            heads=32,
            kv_heads=8,
            head_dim=128,
            mlp_width=32_768,
            norm="rmsnorm",
            norm_eps=1e-5,
            activation="silu",
            gated_mlp=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            vocab_size=131_072,
            max_positions=131_072,
            rope=Rope(theta=1e9),
            tie_word_embeddings=False,
        ),
    )
