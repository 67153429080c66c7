"""CLIP: the image encoder alone, or both towers (transformers, models/clip/modeling_clip.py)."""

from collections.abc import Collection

from vlm_jax.config import CheckpointError, Contrastive, Decoder, Vision
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import drop_nulls
from vlm_jax.hub.families.encoders.vit import (
    block_rows,
    patch_rows,
    shape_from_hf,
    shape_to_hf,
)
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    get_or,
    lookup,
    positive_int,
)
from vlm_jax.hub.families.table import Row, Target, row

BLOCK = {
    "self_norm": "layer_norm1",
    "self/query": "self_attn.q_proj",
    "self/key": "self_attn.k_proj",
    "self/value": "self_attn.v_proj",
    "self/out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
VISION, TEXT = "vision_model.", "text_model."
# An eos_token_id of older files that is wrong: their texts end with the largest id.
LARGEST_ID = 2
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def vision_from_hf(config: Json) -> Vision:
    return Vision(
        **shape_from_hf(config, 32, "quick_gelu"),
        mlp_width=positive_int(config, "intermediate_size", 3072),
        norm_eps=get_or(config, "layer_norm_eps", 1e-5),
        patch_bias=False,
        class_token=True,
        pre_norm=True,
        final_norm="pooled",
        pool="class",
    )


def vision_to_hf(vision: Vision) -> Json:
    return {
        "model_type": "clip_vision_model",
        **shape_to_hf(vision),
        "intermediate_size": vision.mlp_width,
    }


def vision_rows(vision: Vision, hub_prefix: str, param: str) -> list[Row]:
    """Rows of the encoder. Prefixes include their separator: "vision_model.", "vision/"."""
    hf = f"{hub_prefix}embeddings"
    positions = (
        Target(f"{param}class_position", "1 D -> D"),
        Target(f"{param}patch_embed/positions"),
    )
    return [
        row(f"{hf}.class_embedding", f"{param}class_token"),
        Row(f"{hf}.position_embedding.weight", positions),
        *patch_rows(f"{hf}.patch_embedding", param, vision),
        *norm_rows(f"{hub_prefix}pre_layrnorm", f"{param}pre_norm"),
        *block_rows(f"{hub_prefix}encoder.layers", param, vision, BLOCK),
        *norm_rows(f"{hub_prefix}post_layernorm", f"{param}final_norm"),
    ]


def text_from_hf(config: Json) -> Decoder:
    """Reads a text tower; `config` includes the defaults of its family."""
    return Decoder(
        width=positive_int(config, "hidden_size"),
        depth=positive_int(config, "num_hidden_layers"),
        heads=positive_int(config, "num_attention_heads"),
        mlp_width=positive_int(config, "intermediate_size"),
        norm_eps=config["layer_norm_eps"],
        activation=lookup(config, "hidden_act", ACTIVATIONS, ""),
        vocab_size=positive_int(config, "vocab_size"),
        positions="learned",
        max_positions=positive_int(config, "max_position_embeddings"),
    )


def text_to_hf(text: Decoder) -> Json:
    return {
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "intermediate_size": text.mlp_width,
        "layer_norm_eps": text.norm_eps,
        "hidden_act": HUB_ACTIVATIONS[text.activation],
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_positions,
    }


def text_rows(text: Decoder) -> list[Row]:
    return [
        row(f"{TEXT}embeddings.token_embedding.weight", "text/embedding/table"),
        row(f"{TEXT}embeddings.position_embedding.weight", "text/position_embedding/table"),
        *block_rows(f"{TEXT}encoder.layers", "text/", text, BLOCK),
        *norm_rows(f"{TEXT}final_layer_norm", "text/final_norm"),
    ]


def tower_config(config: Json, name: str) -> Json:
    """Settings of one tower; in older files `..._config_dict` takes precedence."""
    return drop_nulls(get_or(config, f"{name}_config_dict", get_or(config, f"{name}_config", {})))


def config_from_hf(config: Json, names: Collection[str]) -> Contrastive:
    text = TEXT_DEFAULTS | {"eos_token_id": 49407} | tower_config(config, "text")
    eos = text["eos_token_id"]
    if not isinstance(eos, int):
        raise CheckpointError(
            f"config.json: eos_token_id {eos} of text_config is not supported: it must be one id."
        )
    pooling = {"text_pool": "first_eos", "eos_id": eos}
    if eos == LARGEST_ID:
        pooling = {"text_pool": "largest_id"}
    return Contrastive(
        vision=vision_from_hf(tower_config(config, "vision")),
        text=text_from_hf(text),
        embed_width=positive_int(config, "projection_dim", 512),
        **pooling,
    )


def config_to_hf(cfg: Contrastive) -> Json:
    eos = LARGEST_ID if cfg.text_pool == "largest_id" else cfg.eos_id
    width = {"projection_dim": cfg.embed_width}
    text = {"model_type": "clip_text_model", **text_to_hf(cfg.text), **width, "eos_token_id": eos}
    vision = vision_to_hf(cfg.vision) | width
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **width,
        "text_config": text,
        "text_config_dict": None,
        "vision_config": vision,
        "vision_config_dict": None,
    }


def param_table(cfg: Contrastive) -> list[Row]:
    return [
        *vision_rows(cfg.vision, VISION, "vision/"),
        *text_rows(cfg.text),
        row("visual_projection.weight", "image_projection/kernel", "W D -> D W"),
        row("text_projection.weight", "text_projection/kernel", "W D -> D W"),
        row("logit_scale", "logit_scale", "-> 1"),
    ]


def vision_only_from_hf(config: Json, names: Collection[str]) -> Vision:
    return vision_from_hf(config)


def vision_only_to_hf(vision: Vision) -> Json:
    return {"architectures": ["CLIPVisionModel"], **vision_to_hf(vision)}


def vision_only_table(vision: Vision) -> list[Row]:
    return vision_rows(vision, VISION, "")


RENAMES_ALONE = ((r"^(?!vision_model\.)", VISION),)  # transformers 5
CLIP = Family("clip", config_from_hf, config_to_hf, param_table)
CLIP_VISION = Family(
    "clip_vision_model", vision_only_from_hf, vision_only_to_hf, vision_only_table, RENAMES_ALONE
)
