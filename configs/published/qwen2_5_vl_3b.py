"""Qwen2.5-VL 3B: a ViT with windows at native resolution, 2 x 2 patches to one token, Qwen2.5."""

from vlm_jax.config import Decoder, Experiment, Fusion, PatchRope, Projector, Rope, Vision

FULL_ATTENTION = (7, 15, 23, 31)


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=1280,
            depth=32,
            heads=16,
            mlp_width=3420,
            norm="rmsnorm",
            activation="silu",
            gated_mlp=True,
            # 1280 image tokens; the processor allows 16,384.
            max_patches=5120,
            patch_square=2,
            image_mean=(0.48145466, 0.4578275, 0.40821073),
            image_std=(0.26862954, 0.26130258, 0.27577711),
            patch_size_px=14,
            patch_frames=2,
            patch_bias=False,
            positions="none",
            rope=PatchRope("same"),
            window_patches=8,
            windowed_layers=tuple(i for i in range(32) if i not in FULL_ATTENTION),
        ),
        projector=Projector("pixel_shuffle", projection="mlp", mlp_width=4 * 1280),
        fusion=Fusion("unified"),
        decoder=Decoder(
            width=2048,
            depth=36,
            heads=16,
            kv_heads=2,
            mlp_width=11_008,
            norm="rmsnorm",
            activation="silu",
            gated_mlp=True,
            out_bias=False,
            mlp_bias=False,
            vocab_size=151_936,
            max_positions=128_000,
            rope=Rope(theta=1_000_000.0, sections=(16, 24, 24)),
        ),
    )
