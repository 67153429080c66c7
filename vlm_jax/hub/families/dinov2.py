"""DINOv2: a ViT whose sublayers are scaled by learned vectors, with a gated MLP in its largest size."""

from collections.abc import Collection

from vlm_jax.config import CheckpointError, Vision
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get,
    number,
)
from vlm_jax.hub.families.gpt2 import norm_rows
from vlm_jax.hub.families.table import Part, Row, row
from vlm_jax.hub.families.vit import (
    ATTENTION,
    ATTENTION_RENAMES,
    block_rows,
    class_rows,
    mlp_ratio,
    patch_rows,
    read_shape,
    write_shape,
)

BLOCK = ATTENTION | {"self_norm": "norm1", "mlp_norm": "norm2"}
MLP = {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
GATED_MLP = {"mlp/down": "mlp.weights_out"}
MASK_TOKEN = "embeddings.mask_token"


def read_vision(config: Json, names: Collection[str]) -> Vision:
    """`names` are the stored tensors of the encoder, without its prefix: the mask token may be missing."""
    gated = get(config, "use_swiglu_ffn", False)
    shape = read_shape(config, 14, "gelu")
    mlp_width = int(shape["width"] * number(config, "mlp_ratio", 4))
    return Vision(
        **shape | ({"activation": "silu"} if gated else {}),
        mlp_width=gated_width(mlp_width) if gated else mlp_width,
        gated_mlp=gated,
        norm_eps=get(config, "layer_norm_eps", 1e-6),
        qkv_bias=get(config, "qkv_bias", True),
        layer_scale="vector",
        class_token=True,
        mask_token=MASK_TOKEN in names,
        pool="class",
    )


def gated_width(mlp_width: int) -> int:
    """Two thirds, up to a multiple of 8: about as many parameters as two matrices of the whole width have."""
    return (int(mlp_width * 2 / 3) + 7) // 8 * 8


def write_vision(vision: Vision) -> Json:
    config = write_shape(vision) | {
        "model_type": "dinov2",
        "mlp_ratio": mlp_ratio(vision.width, vision.mlp_width),
        "use_swiglu_ffn": vision.gated_mlp,
        "qkv_bias": vision.qkv_bias,
        "use_mask_token": vision.mask_token,
    }
    if vision.gated_mlp:
        del config["hidden_act"]  # of the other kind of MLP
        config["mlp_ratio"] = gated_ratio(vision)
    return config


def gated_ratio(vision: Vision) -> int:
    """The smallest ratio whose gated MLP is as wide."""
    for ratio in range(1, vision.mlp_width + 1):
        if gated_width(vision.width * ratio) == vision.mlp_width:
            return ratio
    raise CheckpointError(
        f"vision.mlp_width {vision.mlp_width} is that of no mlp_ratio of DINOv2's gated MLP."
    )


def vision_rows(vision: Vision, hub_prefix: str, ours: str) -> list[Row]:
    """The encoder's rows; both prefixes end with what separates them from names: "dinov2.", "vision/"."""
    found = [
        *class_rows(f"{hub_prefix}embeddings", ours),
        *patch_rows(f"{hub_prefix}embeddings.patch_embeddings.projection", ours, vision),
        *block_rows(
            f"{hub_prefix}encoder.layer",
            ours,
            vision,
            BLOCK | (GATED_MLP if vision.gated_mlp else MLP),
        ),
        *norm_rows(f"{hub_prefix}layernorm", f"{ours}final_norm"),
    ]
    if vision.mask_token:
        found.append(row(f"{hub_prefix}{MASK_TOKEN}", f"{ours}mask_token", "1 D -> D"))
    for turn in range(vision.depth):
        found += scale_rows(
            f"{hub_prefix}encoder.layer.{turn}", f"{ours}blocks/layers/block_0", turn
        )
        if vision.gated_mlp:
            found += gated_rows(f"{hub_prefix}encoder.layer.{turn}.mlp.weights_in", ours, turn)
    return found


def scale_rows(hub: str, ours: str, turn: int) -> list[Row]:
    names = {"layer_scale1.lambda1": "self_scale", "layer_scale2.lambda1": "mlp_scale"}
    return [row(f"{hub}.{a}", f"{ours}/{b}", turn=turn) for a, b in names.items()]


def gated_rows(hub: str, ours: str, turn: int) -> list[Row]:
    """What is activated, then what it is multiplied with."""
    mlp = f"{ours}blocks/layers/block_0/mlp"
    kernels = tuple(Part(f"{mlp}/{name}/kernel", "F D -> D F", turn) for name in ("gate", "up"))
    biases = tuple(Part(f"{mlp}/{name}/bias", "", turn) for name in ("gate", "up"))
    return [Row(f"{hub}.weight", kernels), Row(f"{hub}.bias", biases)]


def write(vision: Vision) -> Json:
    return {"architectures": ["Dinov2Model"], **write_vision(vision)}


def rows(vision: Vision) -> list[Row]:
    return vision_rows(vision, "", "")


RENAMES = ((r"^dinov2\.", ""), (r"\.mlp\.down_proj\.", ".mlp.weights_out."), *ATTENTION_RENAMES)
SPLITS = (
    ("mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")),
)  # the modules of transformers 5 in memory
DINOV2 = Family("dinov2", read_vision, write, rows, RENAMES, splits=SPLITS)
