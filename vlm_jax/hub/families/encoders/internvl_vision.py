"""InternViT, the image encoder of InternVL (Chen et al. 2024): ViT with a scale on each residual.

Source: transformers, models/internvl/modeling_internvl.py.
"""

from vlm_jax.config import CheckpointError, Vision
from vlm_jax.hub.families.decoders.llama import qk_norm_rows
from vlm_jax.hub.families.encoders import vit
from vlm_jax.hub.families.family import Json, get_or, lookup, positive_int, reject_unless
from vlm_jax.hub.families.table import Row, row

BLOCK = {
    "self_norm": "layernorm_before",
    "self/query": "attention.q_proj",
    "self/key": "attention.k_proj",
    "self/value": "attention.v_proj",
    "self/out": "attention.projection_layer",
    "mlp_norm": "layernorm_after",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
SCALES = {"lambda_1": "self_scale", "lambda_2": "mlp_scale"}
NORMS = {"layer_norm": "layernorm", "rms_norm": "rmsnorm"}
DEFAULTS = {  # of InternVLVisionConfig
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
}
QK_NORM_EPS = 1e-6  # of the norms of queries and keys, which are RMSNorm, whatever the file says


def vision_from_hf(config: Json) -> Vision:
    """Reads the encoder.

    Raises:
      CheckpointError: a setting is not supported.
    """
    reject_unless(config, "use_absolute_position_embeddings", True)
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    vision = Vision(
        **vit.shape_from_hf(config, 14, "gelu"),
        mlp_width=positive_int(config, "intermediate_size", 4096),
        norm=lookup(config, "norm_type", NORMS, "layer_norm"),
        norm_eps=get_or(config, "layer_norm_eps", 1e-6),
        qkv_bias=get_or(config, "attention_bias", False),
        qk_norm="all_heads" if get_or(config, "use_qk_norm", False) else "none",
        layer_scale="vector",
        class_token=True,
        mask_token=get_or(config, "use_mask_token", False),
        final_norm="none" if get_or(config, "use_mean_pooling", True) else "tokens",
    )
    if vision.qk_norm != "none" and (vision.norm, vision.norm_eps) != ("rmsnorm", QK_NORM_EPS):
        raise CheckpointError(
            "config.json: use_qk_norm is supported only with norm_type 'rms_norm' and "
            f"layer_norm_eps {QK_NORM_EPS}, the norm of queries and keys."
        )
    if vision.final_norm == "tokens" and vision.norm != "layernorm":
        raise CheckpointError(
            "config.json: use_mean_pooling False is supported only with norm_type 'layer_norm', "
            "the norm after the last block."
        )
    return vision


def vision_to_hf(vision: Vision) -> Json:
    return {
        "model_type": "internvl_vision",
        **vit.shape_to_hf(vision),
        "intermediate_size": vision.mlp_width,
        "norm_type": {norm: name for name, norm in NORMS.items()}[vision.norm],
        "attention_bias": vision.qkv_bias,
        "use_qk_norm": vision.qk_norm == "all_heads",
        "use_mask_token": vision.mask_token,
        "use_mean_pooling": vision.final_norm == "none",
    }


def vision_rows(vision: Vision, hub_prefix: str, param: str) -> list[Row]:
    """Rows of the encoder. Prefixes include their separator: "vision_tower.", "vision/"."""
    hf, blocks = f"{hub_prefix}embeddings", f"{hub_prefix}encoder.layer"
    rows = [
        *vit.class_rows(hf, param),
        *vit.patch_rows(f"{hf}.patch_embeddings.projection", param, vision),
        *vit.block_rows(blocks, param, vision, BLOCK),
    ]
    if vision.mask_token:
        rows.append(row(f"{hf}.mask_token", f"{param}mask_token", "1 1 D -> D"))
    if vision.final_norm == "tokens":
        rows += vit.norm_rows(f"{hub_prefix}layernorm", f"{param}final_norm")
    for layer in range(vision.depth):
        block = f"{param}blocks/layers/block_0"
        rows += qk_norm_rows(f"{blocks}.{layer}.attention", f"{block}/self", vision, layer)
        for name, scale in SCALES.items():
            rows.append(row(f"{blocks}.{layer}.{name}", f"{block}/{scale}", layer=layer))
    return rows
