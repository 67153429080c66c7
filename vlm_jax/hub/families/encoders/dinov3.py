"""DINOv3 (Siméoni et al. 2025): a ViT with registers, LayerScale and 2-D RoPE.

Source: transformers, models/dinov3_vit/modeling_dinov3_vit.py.
"""

from collections.abc import Collection

from vlm_jax.config import PatchRope, Vision
from vlm_jax.hub.families.encoders import vit
from vlm_jax.hub.families.encoders.dinov2 import scale_rows
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get_or,
    positive_int,
    positive_number,
    reject_unless,
)
from vlm_jax.hub.families.table import Row, row

BLOCK = {
    "self_norm": "norm1",
    "self/query": "attention.q_proj",
    "self/key": "attention.k_proj",
    "self/value": "attention.v_proj",
    "self/out": "attention.o_proj",
    "mlp_norm": "norm2",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
GATE = {"mlp/gate": "mlp.gate_proj"}
DEFAULTS = {"hidden_size": 384, "num_attention_heads": 6}  # of DINOv3ViTConfig


def config_from_hf(config: Json, names: Collection[str]) -> Vision:
    """Reads the encoder.

    Raises:
      CheckpointError: a setting is not supported.
    """
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    qkv_bias = get_or(config, "query_bias", True)
    reject_unless({"value_bias": True} | config, "value_bias", qkv_bias)
    return Vision(
        **vit.shape_from_hf(config, 16, "gelu"),
        mlp_width=positive_int(config, "intermediate_size", 1536),
        gated_mlp=get_or(config, "use_gated_mlp", False),
        norm_eps=get_or(config, "layer_norm_eps", 1e-5),
        qkv_bias=qkv_bias,
        key_bias=get_or(config, "key_bias", False),
        out_bias=get_or(config, "proj_bias", True),
        mlp_bias=get_or(config, "mlp_bias", True),
        layer_scale="vector",
        positions="none",
        rope=PatchRope(
            "same", theta=positive_number(config, "rope_theta", 100.0), coordinates="centered"
        ),
        class_token=True,
        # Without registers a file would hold an empty tensor; every published model has 4.
        registers=positive_int(config, "num_register_tokens"),
        mask_token=True,
        pool="class",
    )


def config_to_hf(vision: Vision) -> Json:
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        **vit.shape_to_hf(vision),
        "intermediate_size": vision.mlp_width,
        "use_gated_mlp": vision.gated_mlp,
        "query_bias": vision.qkv_bias,
        "key_bias": vision.key_bias,
        "value_bias": vision.qkv_bias,
        "proj_bias": vision.out_bias,
        "mlp_bias": vision.mlp_bias,
        "rope_theta": vision.rope.theta,
        "num_register_tokens": vision.registers,
    }


def param_table(vision: Vision) -> list[Row]:
    names = BLOCK | (GATE if vision.gated_mlp else {})
    rows = [
        row("embeddings.cls_token", "class_token", "1 1 D -> D"),
        row("embeddings.register_tokens", "registers", "1 Q D -> Q D"),
        row("embeddings.mask_token", "mask_token", "1 1 D -> D"),
        *vit.patch_rows("embeddings.patch_embeddings", "", vision),
        *vit.block_rows("layer", "", vision, names),
        *vit.norm_rows("norm", "final_norm"),
    ]
    for layer in range(vision.depth):
        rows += scale_rows(f"layer.{layer}", "blocks/layers/block_0", layer)
    return rows


RENAMES = ((r"^model\.layer\.", "layer."),)  # module names of transformers 5
DINOV3 = Family("dinov3_vit", config_from_hf, config_to_hf, param_table, RENAMES)
