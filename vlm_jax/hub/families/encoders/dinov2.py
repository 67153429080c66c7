"""DINOv2: a ViT with LayerScale, and a gated MLP in its largest size."""

from collections.abc import Collection

from vlm_jax.config import CheckpointError, Vision
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.encoders.vit import (
    ATTENTION,
    ATTENTION_RENAMES,
    block_rows,
    class_rows,
    mlp_ratio,
    patch_rows,
    shape_from_hf,
    shape_to_hf,
)
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get_or,
    positive_number,
)
from vlm_jax.hub.families.table import Row, Target, row

BLOCK = ATTENTION | {"self_norm": "norm1", "mlp_norm": "norm2"}
MLP = {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
GATED_MLP = {"mlp/down": "mlp.weights_out"}
MASK_TOKEN = "embeddings.mask_token"


def vision_from_hf(config: Json, names: Collection[str]) -> Vision:
    """Reads the encoder; `names` are its tensors without prefix. Some files omit the mask token."""
    gated = get_or(config, "use_swiglu_ffn", False)
    shape = shape_from_hf(config, 14, "gelu")
    mlp_width = int(shape["width"] * positive_number(config, "mlp_ratio", 4))
    return Vision(
        **shape | ({"activation": "silu"} if gated else {}),
        mlp_width=gated_width(mlp_width) if gated else mlp_width,
        gated_mlp=gated,
        norm_eps=get_or(config, "layer_norm_eps", 1e-6),
        qkv_bias=get_or(config, "qkv_bias", True),
        layer_scale="vector",
        class_token=True,
        mask_token=MASK_TOKEN in names,
        pool="class",
    )


def gated_width(mlp_width: int) -> int:
    """Width of the gated MLP: two thirds, rounded up to a multiple of 8."""
    return (int(mlp_width * 2 / 3) + 7) // 8 * 8


def vision_to_hf(vision: Vision) -> Json:
    config = shape_to_hf(vision) | {
        "model_type": "dinov2",
        "mlp_ratio": mlp_ratio(vision.width, vision.mlp_width),
        "use_swiglu_ffn": vision.gated_mlp,
        "qkv_bias": vision.qkv_bias,
        "use_mask_token": vision.mask_token,
    }
    if vision.gated_mlp:
        del config["hidden_act"]  # belongs to the ungated MLP
        config["mlp_ratio"] = gated_ratio(vision)
    return config


def gated_ratio(vision: Vision) -> int:
    """Returns the smallest mlp_ratio with this width of the gated MLP."""
    for ratio in range(1, vision.mlp_width + 1):
        if gated_width(vision.width * ratio) == vision.mlp_width:
            return ratio
    raise CheckpointError(
        f"vision.mlp_width {vision.mlp_width} does not fit DINOv2's gated MLP for any mlp_ratio."
    )


def vision_rows(vision: Vision, hub_prefix: str, param: str) -> list[Row]:
    """Rows of the encoder. Prefixes include their separator: "dinov2.", "vision/"."""
    rows = [
        *class_rows(f"{hub_prefix}embeddings", param),
        *patch_rows(f"{hub_prefix}embeddings.patch_embeddings.projection", param, vision),
        *block_rows(
            f"{hub_prefix}encoder.layer",
            param,
            vision,
            BLOCK | (GATED_MLP if vision.gated_mlp else MLP),
        ),
        *norm_rows(f"{hub_prefix}layernorm", f"{param}final_norm"),
    ]
    if vision.mask_token:
        rows.append(row(f"{hub_prefix}{MASK_TOKEN}", f"{param}mask_token", "1 D -> D"))
    for layer in range(vision.depth):
        rows += scale_rows(
            f"{hub_prefix}encoder.layer.{layer}", f"{param}blocks/layers/block_0", layer
        )
        if vision.gated_mlp:
            rows += gated_rows(f"{hub_prefix}encoder.layer.{layer}.mlp.weights_in", param, layer)
    return rows


def scale_rows(hf: str, param: str, layer: int) -> list[Row]:
    names = {"layer_scale1.lambda1": "self_scale", "layer_scale2.lambda1": "mlp_scale"}
    return [row(f"{hf}.{a}", f"{param}/{b}", layer=layer) for a, b in names.items()]


def gated_rows(hf: str, param: str, layer: int) -> list[Row]:
    """Rows of the gated MLP's input: the gate, then the value it multiplies."""
    mlp = f"{param}blocks/layers/block_0/mlp"
    kernels = tuple(Target(f"{mlp}/{name}/kernel", "F D -> D F", layer) for name in ("gate", "up"))
    biases = tuple(Target(f"{mlp}/{name}/bias", "", layer) for name in ("gate", "up"))
    return [Row(f"{hf}.weight", kernels), Row(f"{hf}.bias", biases)]


def config_to_hf(vision: Vision) -> Json:
    return {"architectures": ["Dinov2Model"], **vision_to_hf(vision)}


def param_table(vision: Vision) -> list[Row]:
    return vision_rows(vision, "", "")


RENAMES = ((r"^dinov2\.", ""), (r"\.mlp\.down_proj\.", ".mlp.weights_out."), *ATTENTION_RENAMES)
# Module names of transformers 5, which some files have.
SPLITS = (("mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")),)
DINOV2 = Family("dinov2", vision_from_hf, config_to_hf, param_table, RENAMES, splits=SPLITS)
