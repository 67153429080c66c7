"""Idefics 9B: CLIP ViT-H/14, a Perceiver resampler, gated cross-attention, and Llama 7B."""

from vlm_jax.config import Decoder, Experiment, Fusion, Projector, Vision


def get_config() -> Experiment:
    return Experiment(
        vision=Vision(
            width=1280,
            depth=32,
            heads=16,
            mlp_width=5120,
            norm_eps=1e-5,
            activation="gelu",
            image_size_px=224,
            image_mean=(0.48145466, 0.4578275, 0.40821073),
            image_std=(0.26862954, 0.26130258, 0.27577711),
            patch_size_px=14,
            patch_bias=False,
            class_token=True,
            keep_class_token=True,
            pre_norm=True,
            final_norm="pooled",
            pool="class",
        ),
        projector=Projector(
            "resampler",
            queries=64,
            depth=6,
            heads=16,
            head_dim=96,
            block_norms=True,
            norm_eps=1e-5,
            projection="none",
            block_activation="relu",
            bias=False,
        ),
        fusion=Fusion(
            kind="cross_attention",
            cross_every=4,
            gated=True,
            placeholder=True,
            tokens_without_image="mask_attention",
        ),
        decoder=Decoder(
            width=4096,
            depth=32,
            heads=32,
            mlp_width=11_008,
            norm="rmsnorm",
            norm_eps=1e-6,
            activation="silu",
            gated_mlp=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            vocab_size=32_000,
            added_tokens=2,
            max_positions=2048,
            tie_word_embeddings=False,
        ),
    )
