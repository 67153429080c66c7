"""CLIP: the image encoder alone, or both towers."""

from collections.abc import Collection

from vlm_jax.config import CheckpointError, Contrastive, Decoder, Vision
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    choose,
    get,
    size,
)
from vlm_jax.hub.families.gpt2 import norm_rows
from vlm_jax.hub.families.llama import given
from vlm_jax.hub.families.table import Part, Row, row
from vlm_jax.hub.families.vit import (
    block_rows,
    patch_rows,
    read_shape,
    write_shape,
)

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
LARGEST_ID = (
    2  # an eos_token_id that older files have by mistake: the text ends with its largest id
)
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


def read_vision(config: Json) -> Vision:
    return Vision(
        **read_shape(config, 32, "quick_gelu"),
        mlp_width=size(config, "intermediate_size", 3072),
        norm_eps=get(config, "layer_norm_eps", 1e-5),
        patch_bias=False,
        class_token=True,
        pre_norm=True,
        final_norm="pooled",
        pool="class",
    )


def write_vision(vision: Vision) -> Json:
    return {
        "model_type": "clip_vision_model",
        **write_shape(vision),
        "intermediate_size": vision.mlp_width,
    }


def vision_rows(vision: Vision, hub_prefix: str, ours: str) -> list[Row]:
    """The encoder's rows; both prefixes end with what separates them from names: "vision_model.", "vision/"."""
    hub = f"{hub_prefix}embeddings"
    positions = (Part(f"{ours}class_position", "1 D -> D"), Part(f"{ours}patch_embed/positions"))
    return [
        row(f"{hub}.class_embedding", f"{ours}class_token"),
        Row(f"{hub}.position_embedding.weight", positions),
        *patch_rows(f"{hub}.patch_embedding", ours, vision),
        *norm_rows(f"{hub_prefix}pre_layrnorm", f"{ours}pre_norm"),
        *block_rows(f"{hub_prefix}encoder.layers", ours, vision, BLOCK),
        *norm_rows(f"{hub_prefix}post_layernorm", f"{ours}final_norm"),
    ]


def read_text(config: Json) -> Decoder:
    """A text tower; `config` has the defaults of its family filled in."""
    return Decoder(
        width=size(config, "hidden_size"),
        depth=size(config, "num_hidden_layers"),
        heads=size(config, "num_attention_heads"),
        mlp_width=size(config, "intermediate_size"),
        norm_eps=config["layer_norm_eps"],
        activation=choose(config, "hidden_act", ACTIVATIONS, ""),
        vocab_size=size(config, "vocab_size"),
        positions="learned",
        max_positions=size(config, "max_position_embeddings"),
    )


def write_text(text: Decoder) -> Json:
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


def tower(config: Json, name: str) -> Json:
    """The settings of one tower; older files have them twice, and `..._dict` is what counts."""
    return given(get(config, f"{name}_config_dict", get(config, f"{name}_config", {})))


def read(config: Json, names: Collection[str]) -> Contrastive:
    text = TEXT_DEFAULTS | {"eos_token_id": 49407} | tower(config, "text")
    eos = text["eos_token_id"]
    if not isinstance(eos, int):
        raise CheckpointError(
            f"config.json: eos_token_id {eos} of text_config is not supported: it has to be one id."
        )
    end = (
        {"text_pool": "largest_id"}
        if eos == LARGEST_ID
        else {"text_pool": "first_eos", "eos_id": eos}
    )
    return Contrastive(
        vision=read_vision(tower(config, "vision")),
        text=read_text(text),
        embed_width=size(config, "projection_dim", 512),
        **end,
    )


def write(cfg: Contrastive) -> Json:
    eos = LARGEST_ID if cfg.text_pool == "largest_id" else cfg.eos_id
    width = {"projection_dim": cfg.embed_width}
    text = {"model_type": "clip_text_model", **write_text(cfg.text), **width, "eos_token_id": eos}
    vision = write_vision(cfg.vision) | width
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **width,
        "text_config": text,
        "text_config_dict": None,
        "vision_config": vision,
        "vision_config_dict": None,
    }


def rows(cfg: Contrastive) -> list[Row]:
    return [
        *vision_rows(cfg.vision, VISION, "vision/"),
        *text_rows(cfg.text),
        row("visual_projection.weight", "image_projection/kernel", "W D -> D W"),
        row("text_projection.weight", "text_projection/kernel", "W D -> D W"),
        row("logit_scale", "logit_scale", "-> 1"),
    ]


def read_alone(config: Json, names: Collection[str]) -> Vision:
    return read_vision(config)


def write_alone(vision: Vision) -> Json:
    return {"architectures": ["CLIPVisionModel"], **write_vision(vision)}


def rows_alone(vision: Vision) -> list[Row]:
    return vision_rows(vision, VISION, "")


RENAMES_ALONE = ((r"^(?!vision_model\.)", VISION),)  # transformers 5
CLIP = Family("clip", read, write, rows)
CLIP_VISION = Family("clip_vision_model", read_alone, write_alone, rows_alone, RENAMES_ALONE)
