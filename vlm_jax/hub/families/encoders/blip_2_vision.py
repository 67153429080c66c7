"""The image encoder of BLIP-2: EVA's ViT (Li et al. 2023, section 3.4).

Source: transformers, models/blip_2/modeling_blip_2.py.
"""

from vlm_jax.config import Vision
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import dense_rows
from vlm_jax.hub.families.encoders import vit
from vlm_jax.hub.families.family import Json, get_or, positive_int
from vlm_jax.hub.families.table import Row, Target, row

# Without the projections of attention.
BLOCK = {
    "self_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
DEFAULTS = {  # of Blip2VisionConfig
    "hidden_size": 1408,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
}


def vision_from_hf(config: Json) -> Vision:
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    return Vision(
        **vit.shape_from_hf(config, 14, "gelu"),
        mlp_width=positive_int(config, "intermediate_size", 6144),
        norm_eps=get_or(config, "layer_norm_eps", 1e-6),
        qkv_bias=bool(get_or(config, "qkv_bias", True)),
        class_token=True,
        keep_class_token=True,
    )


def vision_to_hf(vision: Vision) -> Json:
    return {
        "model_type": "blip_2_vision_model",
        **vit.shape_to_hf(vision),
        "intermediate_size": vision.mlp_width,
        "qkv_bias": vision.qkv_bias,
    }


def vision_rows(vision: Vision, hub_prefix: str, param: str) -> list[Row]:
    """Rows of the encoder. Prefixes include their separator: "vision_model.", "vision/"."""
    hf, blocks = f"{hub_prefix}embeddings", f"{hub_prefix}encoder.layers"
    positions = (
        Target(f"{param}class_position", "1 1 D -> D"),
        Target(f"{param}patch_embed/positions", "1 P D -> P D"),
    )
    rows = [
        row(f"{hf}.class_embedding", f"{param}class_token", "1 1 D -> D"),
        Row(f"{hf}.position_embedding", positions, axis=1),
        *vit.patch_rows(f"{hf}.patch_embedding", param, vision),
        *vit.block_rows(blocks, param, vision, BLOCK),
        *norm_rows(f"{hub_prefix}post_layernorm", f"{param}final_norm"),
    ]
    for layer in range(vision.depth):
        attention = f"{param}blocks/layers/block_0/self"
        rows += qkv_rows(f"{blocks}.{layer}.self_attn.qkv", attention, vision.qkv_bias, layer)
        rows += dense_rows(
            f"{blocks}.{layer}.self_attn.projection",
            f"{attention}/out",
            vit.KERNELS["self/out"],
            True,
            layer,
        )
    return rows


def qkv_rows(hf: str, param: str, bias: bool, layer: int) -> list[Row]:
    """Rows of a Linear whose outputs are queries, keys and values, one after another."""
    names = ("query", "key", "value")
    kernels = [Target(f"{param}/{name}/kernel", "(N H) D -> D N H", layer) for name in names]
    rows = [Row(f"{hf}.weight", tuple(kernels))]
    if bias:
        biases = [Target(f"{param}/{name}/bias", "(N H) -> N H", layer) for name in names]
        rows.append(Row(f"{hf}.bias", tuple(biases)))
    return rows
