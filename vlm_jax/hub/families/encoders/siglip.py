"""SigLIP: the image encoder alone, with or without its pooling head, or both towers."""

from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import CheckpointError, Contrastive, Vision
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import dense_rows
from vlm_jax.hub.families.encoders import clip
from vlm_jax.hub.families.encoders.vit import (
    KERNELS,
    block_rows,
    fused_rows,
    patch_rows,
    shape_from_hf,
    shape_to_hf,
)
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get_or,
    positive_int,
)
from vlm_jax.hub.families.table import Row, row

TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def vision_from_hf(config: Json) -> Vision:
    return Vision(
        **shape_from_hf(config, 16, "gelu_pytorch_tanh"),
        mlp_width=positive_int(config, "intermediate_size", 3072),
        norm_eps=get_or(config, "layer_norm_eps", 1e-6),
        pool="attention" if get_or(config, "vision_use_head", True) else "none",
    )


def vision_to_hf(vision: Vision) -> Json:
    return {
        "model_type": "siglip_vision_model",
        **shape_to_hf(vision),
        "intermediate_size": vision.mlp_width,
        "vision_use_head": vision.pool == "attention",
    }


def vision_rows(vision: Vision, hub_prefix: str, param: str) -> list[Row]:
    """Rows of the encoder. Prefixes include their separator: "vision_model.", "vision/"."""
    hf = f"{hub_prefix}embeddings"
    rows = [
        row(f"{hf}.position_embedding.weight", f"{param}patch_embed/positions"),
        *patch_rows(f"{hf}.patch_embedding", param, vision),
        *block_rows(f"{hub_prefix}encoder.layers", param, vision, clip.BLOCK),
        *norm_rows(f"{hub_prefix}post_layernorm", f"{param}final_norm"),
    ]
    return rows + (
        head_rows(f"{hub_prefix}head", f"{param}pool") if vision.pool == "attention" else []
    )


def head_rows(hf: str, param: str) -> list[Row]:
    """Rows of the pooling head: attention with one learned query, then an MLP."""
    return [
        row(f"{hf}.probe", f"{param}/query", "1 1 D -> D"),
        *fused_rows(f"{hf}.attention", f"{param}/attention"),
        *norm_rows(f"{hf}.layernorm", f"{param}/norm"),
        *dense_rows(f"{hf}.mlp.fc1", f"{param}/mlp/up", KERNELS["mlp/up"], True),
        *dense_rows(f"{hf}.mlp.fc2", f"{param}/mlp/down", KERNELS["mlp/down"], True),
    ]


def config_from_hf(config: Json, names: Collection[str]) -> Contrastive:
    text = TEXT_DEFAULTS | clip.tower_config(config, "text")
    vision = vision_from_hf(clip.tower_config(config, "vision"))
    width = get_or(text, "projection_size", text["hidden_size"])
    if vision.pool == "none":
        raise CheckpointError(
            "config.json: vision_use_head False is not supported: texts need a pooled image vector."
        )
    if width != vision.width:
        raise CheckpointError(
            f"config.json: projection_size {width} of text_config does not match hidden_size "
            f"{vision.width} of vision_config."
        )
    return Contrastive(
        vision=vision,
        text=clip.text_from_hf(text),
        embed_width=width,
        image_projection=False,
        text_projection_bias=True,
        causal=False,
        text_pool="last",
        logit_bias=True,
    )


def config_to_hf(cfg: Contrastive) -> Json:
    text = {
        "model_type": "siglip_text_model",
        **clip.text_to_hf(cfg.text),
        "projection_size": cfg.embed_width,
    }
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": text,
        "vision_config": vision_to_hf(cfg.vision),
    }


def param_table(cfg: Contrastive) -> list[Row]:
    return [
        *vision_rows(cfg.vision, clip.VISION, "vision/"),
        *clip.text_rows(cfg.text),
        *dense_rows(f"{clip.TEXT}head", "text_projection", "W D -> D W", True),
        row("logit_scale", "logit_scale"),
        row("logit_bias", "logit_bias"),
    ]


def vision_only_from_hf(config: Json, names: Collection[str]) -> Vision:
    """Reads the encoder. Some files omit the pooling head without vision_use_head=False."""
    vision = vision_from_hf(config)
    return vision if f"{clip.VISION}head.probe" in names else replace(vision, pool="none")


def vision_only_to_hf(vision: Vision) -> Json:
    return {"architectures": ["SiglipVisionModel"], **vision_to_hf(vision)}


def vision_only_table(vision: Vision) -> list[Row]:
    return vision_rows(vision, clip.VISION, "")


SIGLIP = Family("siglip", config_from_hf, config_to_hf, param_table)
SIGLIP_VISION = Family(
    "siglip_vision_model",
    vision_only_from_hf,
    vision_only_to_hf,
    vision_only_table,
    clip.RENAMES_ALONE,
)
