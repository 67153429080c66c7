"""The tile encoder of Llama 3.2 Vision, and its two conventions of `intermediate_layers_indices`.

The indices are layers of the first stage whose hidden states are concatenated with the output
(intermediate layers). Meta's code, with which the published weights were trained, and transformers
up to 4.51 take the input of these layers; transformers 5 takes their output.
"""

from vlm_jax.config import CHANNELS, CheckpointError, Vision
from vlm_jax.config.bounds import check_number
from vlm_jax.data.tiling import layouts
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import attention_rows, dense_rows
from vlm_jax.hub.families.encoders.vit import patch_rows, side
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Json,
    get_or,
    lookup,
    positive_int,
    reject_unless,
    resolve_aliases,
)
from vlm_jax.hub.families.table import Row, row

TOWER, OURS = "vision_model", "vision/tiled"
# Our own key of config.json, "input" or "output": neither transformers nor Meta's code has one.
INTERMEDIATE_LAYERS = "intermediate_taps"
ALIASES = {"num_attention_heads": "attention_heads"}
# The norms around the blocks ignore config.json, so another epsilon in the blocks is rejected.
NORM_EPS = 1e-5


def vision_from_hf(config: Json, intermediate_layers: str) -> Vision:
    config = resolve_aliases(config, ALIASES)
    reject_unless(config, "norm_eps", NORM_EPS)
    reject_unless(config, "num_channels", CHANNELS)
    tiles, depth = (
        positive_int(config, "max_num_tiles", 4),
        positive_int(config, "num_hidden_layers", 32),
    )
    # Checked here because all layouts of the tiles are listed below.
    check_number("vision.tiles", tiles)
    vision = Vision(
        width=positive_int(config, "hidden_size", 1280),
        depth=depth,
        heads=positive_int(config, "attention_heads", 16),
        mlp_width=positive_int(config, "intermediate_size", 5120),
        norm_eps=NORM_EPS,
        activation=lookup(config, "hidden_act", ACTIVATIONS, "gelu"),
        qkv_bias=False,
        out_bias=False,
        image_size_px=side(config, "image_size", 448),
        patch_size_px=side(config, "patch_size", 14),
        patch_bias=False,
        class_token=True,
        keep_class_token=True,
        pre_norm=True,
        feature_layers=feature_layers_from_hf(
            get_or(config, "intermediate_layers_indices", [3, 7, 15, 23, 30]),
            depth,
            intermediate_layers,
        ),
        tiles=tiles,
        tile_layouts=tuple(map(tuple, get_or(config, "supported_aspect_ratios", layouts(tiles)))),
        num_global_layers=positive_int(config, "num_global_layers", 8),
    )
    reject_unless({"vision_output_dim": 7680} | config, "vision_output_dim", vision.output_width)
    return vision


def feature_layers_from_hf(
    layers: list[int], depth: int, intermediate_layers: str
) -> tuple[int, ...]:
    """Layers of config.json -> hidden states: 0 is the first layer's input, n the n-th's output."""
    states = tuple(n + (intermediate_layers == "output") for n in layers)
    if not all(0 <= n <= depth for n in states):
        raise CheckpointError(
            f"config.json: intermediate_layers_indices {layers} are outside the {depth} layers."
        )
    return states


def vision_to_hf(vision: Vision, intermediate_layers: str) -> Json:
    return {
        "model_type": "mllama_vision_model",
        "hidden_size": vision.width,
        "num_hidden_layers": vision.depth,
        "num_global_layers": vision.num_global_layers,
        "attention_heads": vision.heads,
        "intermediate_size": vision.mlp_width,
        "hidden_act": HUB_ACTIVATIONS[vision.activation],
        "norm_eps": vision.norm_eps,
        "image_size": vision.image_size_px,
        "patch_size": vision.patch_size_px,
        "num_channels": CHANNELS,
        "vision_output_dim": vision.output_width,
        "max_num_tiles": vision.tiles,
        "supported_aspect_ratios": list(map(list, vision.tile_layouts)),
        "intermediate_layers_indices": feature_layers_to_hf(vision, intermediate_layers),
        **({INTERMEDIATE_LAYERS: intermediate_layers} if intermediate_layers != "input" else {}),
    }


def feature_layers_to_hf(vision: Vision, intermediate_layers: str) -> list[int]:
    layers = [
        n % (vision.depth + 1) - (intermediate_layers == "output") for n in vision.feature_layers
    ]
    if -1 in layers:
        raise CheckpointError(
            "vision.feature_layers 0 is not the output of a layer: export with "
            "intermediate_layers 'input'."
        )
    return layers


def vision_rows(vision: Vision) -> list[Row]:
    rows = [
        *patch_rows(f"{TOWER}.patch_embedding", f"{OURS}/", vision),
        row(f"{TOWER}.class_embedding", f"{OURS}/class_token"),
        *norm_rows(f"{TOWER}.layernorm_pre", f"{OURS}/pre_norm"),
        *norm_rows(f"{TOWER}.layernorm_post", f"{OURS}/final_norm"),
        *position_rows(f"{TOWER}.gated_positional_embedding"),
    ]
    for name in ("pre_tile", "post_tile"):
        rows.append(
            row(f"{TOWER}.{name}_positional_embedding.embedding.weight", f"{OURS}/{name}/table")
        )
        rows.append(row(f"{TOWER}.{name}_positional_embedding.gate", f"{OURS}/{name}_gate"))
    for layer in range(vision.depth):
        rows += block_rows(
            f"{TOWER}.transformer.layers.{layer}", f"{OURS}/blocks/layers/block_0", vision, layer
        )
    for layer in range(vision.num_global_layers):
        hf, param = (
            f"{TOWER}.global_transformer.layers.{layer}",
            f"{OURS}/global_blocks/layers/block_0",
        )
        rows += block_rows(hf, param, vision, layer)
        rows.append(row(f"{hf}.gate_attn", f"{param}/self_gate", layer=layer))
        rows.append(row(f"{hf}.gate_ffn", f"{param}/mlp_gate", layer=layer))
    return rows


def position_rows(hf: str) -> list[Row]:
    return [
        row(f"{hf}.embedding", f"{OURS}/positions"),
        row(f"{hf}.tile_embedding.weight", f"{OURS}/tile_positions/table"),
        row(f"{hf}.gate", f"{OURS}/positions_gate"),
    ]


def block_rows(hf: str, param: str, vision: Vision, layer: int) -> list[Row]:
    return [
        *attention_rows(f"{hf}.self_attn", f"{param}/self", vision, layer),
        *dense_rows(f"{hf}.mlp.fc1", f"{param}/mlp/up", "F D -> D F", True, layer),
        *dense_rows(f"{hf}.mlp.fc2", f"{param}/mlp/down", "D F -> F D", True, layer),
        *norm_rows(f"{hf}.input_layernorm", f"{param}/self_norm", layer),
        *norm_rows(f"{hf}.post_attention_layernorm", f"{param}/mlp_norm", layer),
    ]
