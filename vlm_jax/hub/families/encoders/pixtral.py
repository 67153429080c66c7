"""Pixtral's image encoder (Agrawal et al. 2024): Llama's block over patches at native resolution.

Source: transformers, models/pixtral/modeling_pixtral.py.
"""

from dataclasses import replace

from vlm_jax.config import CheckpointError, PatchRope, Vision
from vlm_jax.hub.families.decoders.llama import norm_row
from vlm_jax.hub.families.encoders import vit
from vlm_jax.hub.families.family import Json, get_or, positive_int
from vlm_jax.hub.families.table import Row

DEFAULTS = {  # of PixtralVisionConfig
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 1024,
}
EPS = 1e-5  # of the norms, in no file
BLOCK = {
    "self_norm": "attention_norm",
    "self/query": "attention.q_proj",
    "self/key": "attention.k_proj",
    "self/value": "attention.v_proj",
    "self/out": "attention.o_proj",
    "mlp_norm": "ffn_norm",
    "mlp/gate": "feed_forward.gate_proj",
    "mlp/up": "feed_forward.up_proj",
    "mlp/down": "feed_forward.down_proj",
}


def vision_from_hf(config: Json) -> Vision:
    """Reads the encoder.

    Raises:
      CheckpointError: a setting is not supported.
    """
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    rope = get_or(config, "rope_parameters", {})
    vision = Vision(
        **vit.shape_from_hf(config, 16, "gelu"),
        mlp_width=positive_int(config, "intermediate_size", 4096),
        norm="rmsnorm",
        norm_eps=EPS,
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        patch_bias=False,
        positions="none",
        rope=PatchRope(
            "alternate", theta=float(config.get("rope_theta", rope.get("rope_theta", 10_000.0)))
        ),
        pre_norm=True,
        final_norm="none",
        newline_token=True,
    )
    head_dim = config.get("head_dim", vision.head_width)
    if head_dim != vision.head_width:
        raise CheckpointError(
            f"config.json: head_dim {head_dim} of vision_config is not supported: it must be "
            f"hidden_size / num_attention_heads, {vision.head_width}."
        )
    rows, columns = vision.grid
    return replace(vision, max_patches=rows * columns)


def vision_to_hf(vision: Vision) -> Json:
    config = vit.shape_to_hf(vision)
    del config["layer_norm_eps"]
    return config | {
        "model_type": "pixtral",
        "intermediate_size": vision.mlp_width,
        "head_dim": vision.head_width,
        "rope_theta": vision.rope.theta,
    }


def vision_rows(vision: Vision, hub_prefix: str, param: str) -> list[Row]:
    """Rows of the encoder. Prefixes include their separator: "vision_tower.", "vision/"."""
    return [
        *vit.patch_rows(f"{hub_prefix}patch_conv", param, vision),
        norm_row(f"{hub_prefix}ln_pre", f"{param}pre_norm"),
        *vit.block_rows(f"{hub_prefix}transformer.layers", param, vision, BLOCK),
    ]
