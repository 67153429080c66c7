"""ViT, and the rows that all encoders of its kind share: CLIP, SigLIP and DINOv2 have other names for them."""

import math
from collections.abc import Collection, Mapping

from vlm_jax.config import CHANNELS, CheckpointError, Transformer, Vision
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    Renames,
    choose,
    get,
    refuse,
    size,
)
from vlm_jax.hub.families.gpt2 import norm_rows
from vlm_jax.hub.families.llama import dense_rows
from vlm_jax.hub.families.table import Part, Row, row

KERNELS = {  # of a block: our names, and the way from torch's axes to ours
    "self/query": "(N H) D -> D N H",
    "self/key": "(K H) D -> D K H",
    "self/value": "(K H) D -> D K H",
    "self/out": "D (N H) -> N H D",
    "mlp/up": "F D -> D F",
    "mlp/down": "D F -> F D",
}
QKV = ("self/query", "self/key", "self/value")
ATTENTION = {
    "self/query": "attention.attention.query",
    "self/key": "attention.attention.key",
    "self/value": "attention.attention.value",
    "self/out": "attention.output.dense",
}
BLOCK = ATTENTION | {
    "self_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
PREFIX, CLASSIFIER, POOLER = "vit.", "classifier", "pooler.dense"


def read_shape(config: Json, patch: int, activation: str) -> dict:
    """The fields of a Vision that all these encoders spell alike; `patch` and `activation` are a family's defaults."""
    refuse(config, "num_channels", CHANNELS)
    return {
        "width": size(config, "hidden_size", 768),
        "depth": size(config, "num_hidden_layers", 12),
        "heads": size(config, "num_attention_heads", 12),
        "activation": choose(config, "hidden_act", ACTIVATIONS, activation),
        "image_size_px": side(config, "image_size", 224),
        "patch_size_px": side(config, "patch_size", patch),
    }


def side(config: Json, key: str, default: int) -> int:
    """The side of a square, which may be given twice."""
    value = get(config, key, default)
    sides = value if isinstance(value, list) else [value]
    if not sides or any(length != sides[0] for length in sides):
        raise CheckpointError(
            f"config.json: {key} {value} is not supported: images and patches have to be square."
        )
    return size({key: sides[0]}, key)


def write_shape(vision: Vision) -> Json:
    return {
        "hidden_size": vision.width,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "hidden_act": HUB_ACTIVATIONS[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        "image_size": vision.image_size_px,
        "patch_size": vision.patch_size_px,
        "num_channels": CHANNELS,
    }


def read_vision(config: Json, names: Collection[str]) -> Vision:
    """`names` are the stored tensors of the encoder, without its prefix: pooler and classifier may be missing."""
    classes = num_classes(config) if f"{CLASSIFIER}.weight" in names else 0
    pools = f"{POOLER}.weight" in names
    vision = Vision(
        **read_shape(config, 16, "gelu"),
        mlp_width=size(config, "intermediate_size", 3072),
        norm_eps=get(config, "layer_norm_eps", 1e-12),
        qkv_bias=get(config, "qkv_bias", True),
        class_token=True,
        pool="tanh" if pools else "none",
        classes=classes,
    )
    if pools:
        refuse(config, "pooler_act", "tanh", None)
        refuse(config, "pooler_output_size", vision.width, None)
    return vision


def num_classes(config: Json) -> int:
    """config.json names the classes, or counts them; two go without saying."""
    return len(get(config, "id2label", {})) or size(config, "num_labels", 2)


def write_vision(vision: Vision) -> Json:
    config = write_shape(vision) | {
        "model_type": "vit",
        "intermediate_size": vision.mlp_width,
        "qkv_bias": vision.qkv_bias,
    }
    return config | ({"num_labels": vision.classes} if vision.classes else {})


def vision_rows(vision: Vision, hub_prefix: str, ours: str) -> list[Row]:
    """The encoder's rows; both prefixes end with what separates them from names: "encoder.", "vision/"."""
    rows = [
        *class_rows(f"{hub_prefix}embeddings", ours),
        *patch_rows(f"{hub_prefix}embeddings.patch_embeddings.projection", ours, vision),
        *block_rows(f"{hub_prefix}encoder.layer", ours, vision, BLOCK),
        *norm_rows(f"{hub_prefix}layernorm", f"{ours}final_norm"),
    ]
    pools = vision.pool == "tanh"
    return rows + (
        dense_rows(f"{hub_prefix}{POOLER}", f"{ours}pool", "F D -> D F", True) if pools else []
    )


def class_rows(hub: str, ours: str) -> list[Row]:
    """The class token, and positions whose first row is its own."""
    positions = (
        Part(f"{ours}class_position", "1 1 D -> D"),
        Part(f"{ours}patch_embed/positions", "1 P D -> P D"),
    )
    return [
        row(f"{hub}.cls_token", f"{ours}class_token", "1 1 D -> D"),
        Row(f"{hub}.position_embeddings", positions, axis=1),
    ]


def patch_rows(hub: str, ours: str, vision: Vision) -> list[Row]:
    """A strided convolution of torch, (D, channels, height, width), as the product that `PatchEmbed` keeps."""
    ours, patch = f"{ours}patch_embed/projection", vision.patch_size_px
    rows = [row(f"{hub}.weight", f"{ours}/kernel", "D c p q -> (p q c) D", p=patch, q=patch)]
    return rows + ([row(f"{hub}.bias", f"{ours}/bias")] if vision.patch_bias else [])


def block_rows(hub: str, ours: str, cfg: Transformer, names: Mapping[str, str]) -> list[Row]:
    """Blocks of self-attention and MLP, `{hub}.0`, `{hub}.1`, ...; `names` says how each layer is called there."""
    rows = []
    for turn in range(cfg.depth):
        for name, called in names.items():
            there, here = f"{hub}.{turn}.{called}", f"{ours}blocks/layers/block_0/{name}"
            if name in KERNELS:
                rows += dense_rows(
                    there, here, KERNELS[name], cfg.qkv_bias or name not in QKV, turn
                )
            else:
                rows += norm_rows(there, here, turn)
    return rows


def fused_rows(hub: str, ours: str, turn: int | None = None) -> list[Row]:
    """torch's MultiheadAttention, in which the projections of queries, keys and values are one tensor."""
    names = ("query", "key", "value")
    kernels = tuple(Part(f"{ours}/{name}/kernel", "(N H) D -> D N H", turn) for name in names)
    biases = tuple(Part(f"{ours}/{name}/bias", "(N H) -> N H", turn) for name in names)
    fused = [Row(f"{hub}.in_proj_weight", kernels), Row(f"{hub}.in_proj_bias", biases)]
    return fused + dense_rows(f"{hub}.out_proj", f"{ours}/out", KERNELS["self/out"], True, turn)


def mlp_ratio(width: int, mlp_width: int) -> float:
    """What the width is multiplied by, and then rounded down, to give the MLP's; a whole number where there is one."""
    ratio = mlp_width / width
    if ratio.is_integer():
        return int(ratio)
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def read(config: Json, names: Collection[str]) -> Vision:
    return read_vision(config, [name.removeprefix(PREFIX) for name in names])


def write(vision: Vision) -> Json:
    return {
        "architectures": ["ViTForImageClassification" if vision.classes else "ViTModel"],
        **write_vision(vision),
    }


def rows(vision: Vision) -> list[Row]:
    """The model of a classifier stands below a name of its own."""
    if not vision.classes:
        return vision_rows(vision, "", "")
    return vision_rows(vision, PREFIX, "") + dense_rows(
        CLASSIFIER, "classifier", "V D -> D V", True
    )


ATTENTION_RENAMES = (  # the modules of transformers 5 in memory
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
MODULE_RENAMES = (
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    *ATTENTION_RENAMES,
)


def renames(names: Collection[str]) -> Renames:
    prefix = PREFIX if f"{CLASSIFIER}.weight" in names else ""
    below = (
        (rf"^{PREFIX}", ""),
        (r"^layers\.", "encoder.layer."),
        (rf"^(?!{CLASSIFIER}\.)", prefix),
    )
    return below + MODULE_RENAMES


VIT = Family("vit", read, write, rows, renames)
