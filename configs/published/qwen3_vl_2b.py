"""Qwen3-VL 2B: a ViT at native resolution, three of its hidden states for DeepStack, Qwen3 1.7B."""

from vlm_jax.config import Decoder, Experiment, Fusion, PatchRope, Projector, Rope, Vision


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=1024,
            depth=24,
            heads=16,
            mlp_width=4096,
            # Of the learned positions, 48 x 48 patches.
            image_size_px=768,
            max_patches=5120,
            patch_square=2,
            patch_size_px=16,
            patch_frames=2,
            resample_positions="corners",
            rope=PatchRope("same"),
            deepstack_layers=(6, 12, 18),
        ),
        projector=Projector("pixel_shuffle", projection="mlp", mlp_width=4 * 1024),
        fusion=Fusion("unified"),
        decoder=Decoder(
            width=2048,
            depth=28,
            heads=16,
            kv_heads=8,
            head_dim=128,
            mlp_width=6144,
            norm="rmsnorm",
            activation="silu",
            gated_mlp=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            qk_norm="head",
            vocab_size=151_936,
            max_positions=262_144,
            rope=Rope(theta=5_000_000.0, sections=(24, 20, 20), interleaved=True),
        ),
    )
