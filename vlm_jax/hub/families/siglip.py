"""SigLIP: the image encoder alone, with or without the head that pools, or both towers."""

from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import CheckpointError, Contrastive, Vision
from vlm_jax.hub.families import clip
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get,
    size,
)
from vlm_jax.hub.families.gpt2 import norm_rows
from vlm_jax.hub.families.llama import dense_rows
from vlm_jax.hub.families.table import Row, row
from vlm_jax.hub.families.vit import (
    KERNELS,
    block_rows,
    fused_rows,
    patch_rows,
    read_shape,
    write_shape,
)

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


def read_vision(config: Json) -> Vision:
    return Vision(
        **read_shape(config, 16, "gelu_pytorch_tanh"),
        mlp_width=size(config, "intermediate_size", 3072),
        norm_eps=get(config, "layer_norm_eps", 1e-6),
        pool="attention" if get(config, "vision_use_head", True) else "none",
    )


def write_vision(vision: Vision) -> Json:
    return {
        "model_type": "siglip_vision_model",
        **write_shape(vision),
        "intermediate_size": vision.mlp_width,
        "vision_use_head": vision.pool == "attention",
    }


def vision_rows(vision: Vision, hub_prefix: str, ours: str) -> list[Row]:
    """The encoder's rows; both prefixes end with what separates them from names: "vision_model.", "vision/"."""
    hub = f"{hub_prefix}embeddings"
    rows = [
        row(f"{hub}.position_embedding.weight", f"{ours}patch_embed/positions"),
        *patch_rows(f"{hub}.patch_embedding", ours, vision),
        *block_rows(f"{hub_prefix}encoder.layers", ours, vision, clip.BLOCK),
        *norm_rows(f"{hub_prefix}post_layernorm", f"{ours}final_norm"),
    ]
    return rows + (
        head_rows(f"{hub_prefix}head", f"{ours}pool") if vision.pool == "attention" else []
    )


def head_rows(hub: str, ours: str) -> list[Row]:
    """Attention of one learned query, and an MLP."""
    return [
        row(f"{hub}.probe", f"{ours}/query", "1 1 D -> D"),
        *fused_rows(f"{hub}.attention", f"{ours}/attention"),
        *norm_rows(f"{hub}.layernorm", f"{ours}/norm"),
        *dense_rows(f"{hub}.mlp.fc1", f"{ours}/mlp/up", KERNELS["mlp/up"], True),
        *dense_rows(f"{hub}.mlp.fc2", f"{ours}/mlp/down", KERNELS["mlp/down"], True),
    ]


def read(config: Json, names: Collection[str]) -> Contrastive:
    text, vision = (
        TEXT_DEFAULTS | clip.tower(config, "text"),
        read_vision(clip.tower(config, "vision")),
    )
    width = get(text, "projection_size", text["hidden_size"])
    if vision.pool == "none":
        raise CheckpointError(
            "config.json: vision_use_head False leaves no vector of an image to compare with a text."
        )
    if width != vision.width:
        raise CheckpointError(
            f"config.json: texts of projection_size {width} cannot be compared with images of hidden_size "
            f"{vision.width}."
        )
    return Contrastive(
        vision=vision,
        text=clip.read_text(text),
        embed_width=width,
        image_projection=False,
        text_projection_bias=True,
        causal=False,
        text_pool="last",
        logit_bias=True,
    )


def write(cfg: Contrastive) -> Json:
    text = {
        "model_type": "siglip_text_model",
        **clip.write_text(cfg.text),
        "projection_size": cfg.embed_width,
    }
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": text,
        "vision_config": write_vision(cfg.vision),
    }


def rows(cfg: Contrastive) -> list[Row]:
    return [
        *vision_rows(cfg.vision, clip.VISION, "vision/"),
        *clip.text_rows(cfg.text),
        *dense_rows(f"{clip.TEXT}head", "text_projection", "W D -> D W", True),
        row("logit_scale", "logit_scale"),
        row("logit_bias", "logit_bias"),
    ]


def read_alone(config: Json, names: Collection[str]) -> Vision:
    """Files may lack the head that their config.json does not deny."""
    vision = read_vision(config)
    return vision if f"{clip.VISION}head.probe" in names else replace(vision, pool="none")


def write_alone(vision: Vision) -> Json:
    return {"architectures": ["SiglipVisionModel"], **write_vision(vision)}


def rows_alone(vision: Vision) -> list[Row]:
    return vision_rows(vision, clip.VISION, "")


SIGLIP = Family("siglip", read, write, rows)
SIGLIP_VISION = Family(
    "siglip_vision_model", read_alone, write_alone, rows_alone, clip.RENAMES_ALONE
)
