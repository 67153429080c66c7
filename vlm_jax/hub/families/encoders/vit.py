"""ViT, and the rows that CLIP, SigLIP and DINOv2 share with it under other names."""

import math
from collections.abc import Collection, Mapping

from vlm_jax.config import CHANNELS, CheckpointError, Transformer, Vision
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import dense_rows, norm_row
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    Json,
    Renames,
    get_or,
    lookup,
    positive_int,
    reject_unless,
)
from vlm_jax.hub.families.table import Row, Target, row

# Kernels of a block: path and pattern from torch's axes.
KERNELS = {
    "self/query": "(N H) D -> D N H",
    "self/key": "(K H) D -> D K H",
    "self/value": "(K H) D -> D K H",
    "self/out": "D (N H) -> N H D",
    "mlp/gate": "F D -> D F",
    "mlp/up": "F D -> D F",
    "mlp/down": "D F -> F D",
}
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


def shape_from_hf(config: Json, patch: int, activation: str) -> dict:
    """Reads the fields that all these encoders name alike; `patch`, `activation` are defaults."""
    reject_unless(config, "num_channels", CHANNELS)
    return {
        "width": positive_int(config, "hidden_size", 768),
        "depth": positive_int(config, "num_hidden_layers", 12),
        "heads": positive_int(config, "num_attention_heads", 12),
        "activation": lookup(config, "hidden_act", ACTIVATIONS, activation),
        "image_size_px": side(config, "image_size", 224),
        "patch_size_px": side(config, "patch_size", patch),
    }


def side(config: Json, key: str, default: int) -> int:
    """Reads the side of a square, an integer or [height, width]."""
    value = get_or(config, key, default)
    sides = value if isinstance(value, list) else [value]
    if not sides or any(length != sides[0] for length in sides):
        raise CheckpointError(
            f"config.json: {key} {value} is not supported: images and patches must be square."
        )
    return positive_int({key: sides[0]}, key)


def shape_to_hf(vision: Vision) -> Json:
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


def vision_from_hf(config: Json, names: Collection[str]) -> Vision:
    """Reads the encoder; `names` are its tensors, without prefix."""
    classes = num_classes(config) if f"{CLASSIFIER}.weight" in names else None
    pools = f"{POOLER}.weight" in names
    vision = Vision(
        **shape_from_hf(config, 16, "gelu"),
        mlp_width=positive_int(config, "intermediate_size", 3072),
        norm_eps=get_or(config, "layer_norm_eps", 1e-12),
        qkv_bias=get_or(config, "qkv_bias", True),
        class_token=True,
        pool="tanh" if pools else "none",
        classes=classes,
    )
    if pools:
        reject_unless(config, "pooler_act", "tanh", None)
        reject_unless(config, "pooler_output_size", vision.width, None)
    return vision


def num_classes(config: Json) -> int:
    """Number of classes: len(id2label), else num_labels, else 2 (the default of transformers)."""
    return len(get_or(config, "id2label", {})) or positive_int(config, "num_labels", 2)


def vision_to_hf(vision: Vision) -> Json:
    config = shape_to_hf(vision) | {
        "model_type": "vit",
        "intermediate_size": vision.mlp_width,
        "qkv_bias": vision.qkv_bias,
    }
    return config if vision.classes is None else config | {"num_labels": vision.classes}


def vision_rows(vision: Vision, hub_prefix: str, param: str) -> list[Row]:
    """Rows of the encoder. Prefixes include their separator: "encoder.", "vision/"."""
    rows = [
        *class_rows(f"{hub_prefix}embeddings", param),
        *patch_rows(f"{hub_prefix}embeddings.patch_embeddings.projection", param, vision),
        *block_rows(f"{hub_prefix}encoder.layer", param, vision, BLOCK),
        *norm_rows(f"{hub_prefix}layernorm", f"{param}final_norm"),
    ]
    pools = vision.pool == "tanh"
    return rows + (
        dense_rows(f"{hub_prefix}{POOLER}", f"{param}pool", "F D -> D F", True) if pools else []
    )


def class_rows(hf: str, param: str) -> list[Row]:
    """Rows of the class token and of positions, whose first row is the class token's."""
    positions = (
        Target(f"{param}class_position", "1 1 D -> D"),
        Target(f"{param}patch_embed/positions", "1 P D -> P D"),
    )
    return [
        row(f"{hf}.cls_token", f"{param}class_token", "1 1 D -> D"),
        Row(f"{hf}.position_embeddings", positions, axis=1),
    ]


def patch_rows(hf: str, param: str, vision: Vision) -> list[Row]:
    """Rows of the patch embedding, stored as a convolution (D, channels, height, width)."""
    param, patch = f"{param}patch_embed/projection", vision.patch_size_px
    rows = [row(f"{hf}.weight", f"{param}/kernel", "D c p q -> (p q c) D", p=patch, q=patch)]
    return rows + ([row(f"{hf}.bias", f"{param}/bias")] if vision.patch_bias else [])


def block_rows(hf: str, param: str, cfg: Transformer, names: Mapping[str, str]) -> list[Row]:
    """Rows of blocks `{hf}.0`, `{hf}.1`, ...; `names` maps our sublayer paths to their names."""
    rows = []
    for layer in range(cfg.depth):
        for name, hf_name in names.items():
            tensor = f"{hf}.{layer}.{hf_name}"
            path = f"{param}blocks/layers/block_0/{name}"
            if name in KERNELS:
                has_bias = cfg.has_bias(name.split("/")[1])
                rows += dense_rows(tensor, path, KERNELS[name], has_bias, layer)
            elif cfg.norm == "layernorm":
                rows += norm_rows(tensor, path, layer)
            else:
                rows.append(norm_row(tensor, path, layer))
    return rows


def fused_rows(hf: str, param: str, layer: int | None = None) -> list[Row]:
    """Rows of torch's MultiheadAttention, with one tensor for query, key and value projections."""
    names = ("query", "key", "value")
    kernels = tuple(Target(f"{param}/{name}/kernel", "(N H) D -> D N H", layer) for name in names)
    biases = tuple(Target(f"{param}/{name}/bias", "(N H) -> N H", layer) for name in names)
    fused = [Row(f"{hf}.in_proj_weight", kernels), Row(f"{hf}.in_proj_bias", biases)]
    return fused + dense_rows(f"{hf}.out_proj", f"{param}/out", KERNELS["self/out"], True, layer)


def mlp_ratio(width: int, mlp_width: int) -> float:
    """Returns a ratio with int(width * ratio) == mlp_width; an integer if possible."""
    ratio = mlp_width / width
    if ratio.is_integer():
        return int(ratio)
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def config_from_hf(config: Json, names: Collection[str]) -> Vision:
    return vision_from_hf(config, [name.removeprefix(PREFIX) for name in names])


def config_to_hf(vision: Vision) -> Json:
    return {
        "architectures": ["ViTModel" if vision.classes is None else "ViTForImageClassification"],
        **vision_to_hf(vision),
    }


def param_table(vision: Vision) -> list[Row]:
    """Rows of the encoder; below the prefix "vit." if it has a classifier."""
    if vision.classes is None:
        return vision_rows(vision, "", "")
    return vision_rows(vision, PREFIX, "") + dense_rows(
        CLASSIFIER, "classifier", "V D -> D V", True
    )


ATTENTION_RENAMES = (  # module names of transformers 5
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
MODULE_NAMES = (  # the inverse, for names below `encoder.`
    (r"^(encoder\..+)\.attention\.attention\.query\.", r"\1.attention.q_proj."),
    (r"^(encoder\..+)\.attention\.attention\.key\.", r"\1.attention.k_proj."),
    (r"^(encoder\..+)\.attention\.attention\.value\.", r"\1.attention.v_proj."),
    (r"^(encoder\..+)\.attention\.output\.dense\.", r"\1.attention.o_proj."),
    (r"^(encoder\..+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(encoder\..+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def renames(names: Collection[str]) -> Renames:
    prefix = PREFIX if f"{CLASSIFIER}.weight" in names else ""
    below = (
        (rf"^{PREFIX}", ""),
        (r"^layers\.", "encoder.layer."),
        (rf"^(?!{CLASSIFIER}\.)", prefix),
    )
    return below + MODULE_RENAMES


VIT = Family("vit", config_from_hf, config_to_hf, param_table, renames)
