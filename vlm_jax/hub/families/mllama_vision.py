"""The encoder of Llama 3.2 Vision, images in tiles, and what its `intermediate_layers_indices` count.

They are layers of the encoder's first stage whose numbers go on beside its output ("taps"). Meta's code, with which the
published weights were trained, and transformers up to 4.51 take what enters these layers; transformers 5 takes what
leaves them.
"""

from vlm_jax.config import CHANNELS, CheckpointError, Vision
from vlm_jax.config.bounds import check_numbers
from vlm_jax.data.tiling import layouts
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Json,
    choose,
    get,
    refuse,
    size,
    unaliased,
)
from vlm_jax.hub.families.gpt2 import norm_rows
from vlm_jax.hub.families.llama import attention_rows, dense_rows
from vlm_jax.hub.families.table import Row, row
from vlm_jax.hub.families.vit import patch_rows, side

TOWER, OURS = "vision_model", "vision/tiled"
TAPS = "intermediate_taps"  # a key of ours: "input" or "output", which neither transformers nor Meta's code says
ALIASES = {"num_attention_heads": "attention_heads"}
NORM_EPS = 1e-5  # of the norms before and after the blocks whatever config.json says, so of those in the blocks, too


def read_vision(config: Json, taps: str) -> Vision:
    config = unaliased(config, ALIASES)
    refuse(config, "norm_eps", NORM_EPS)
    refuse(config, "num_channels", CHANNELS)
    tiles, depth = size(config, "max_num_tiles", 4), size(config, "num_hidden_layers", 32)
    check_numbers({"vision.tiles": tiles})  # before their layouts are listed
    vision = Vision(
        width=size(config, "hidden_size", 1280),
        depth=depth,
        heads=size(config, "attention_heads", 16),
        mlp_width=size(config, "intermediate_size", 5120),
        norm_eps=NORM_EPS,
        activation=choose(config, "hidden_act", ACTIVATIONS, "gelu"),
        qkv_bias=False,
        out_bias=False,
        image_size_px=side(config, "image_size", 448),
        patch_size_px=side(config, "patch_size", 14),
        patch_bias=False,
        class_token=True,
        keep_class_token=True,
        pre_norm=True,
        feature_layers=read_taps(
            get(config, "intermediate_layers_indices", [3, 7, 15, 23, 30]), depth, taps
        ),
        tiles=tiles,
        tile_layouts=tuple(map(tuple, get(config, "supported_aspect_ratios", layouts(tiles)))),
        num_global_layers=size(config, "num_global_layers", 8),
    )
    refuse({"vision_output_dim": 7680} | config, "vision_output_dim", vision.output_width)
    return vision


def read_taps(layers: list[int], depth: int, taps: str) -> tuple[int, ...]:
    """Layers of config.json -> hidden states: 0 enters the first layer, n leaves the n-th."""
    states = tuple(n + (taps == "output") for n in layers)
    if not all(0 <= n <= depth for n in states):
        raise CheckpointError(
            f"config.json: intermediate_layers_indices {layers} are not among the {depth} layers."
        )
    return states


def write_vision(vision: Vision, taps: str) -> Json:
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
        "intermediate_layers_indices": write_taps(vision, taps),
        **({TAPS: taps} if taps != "input" else {}),
    }


def write_taps(vision: Vision, taps: str) -> list[int]:
    layers = [n % (vision.depth + 1) - (taps == "output") for n in vision.feature_layers]
    if -1 in layers:
        raise CheckpointError(
            "vision.feature_layers 0 is the output of no layer: write the checkpoint with taps 'input'."
        )
    return layers


def vision_rows(vision: Vision) -> list[Row]:
    found = [
        *patch_rows(f"{TOWER}.patch_embedding", f"{OURS}/", vision),
        row(f"{TOWER}.class_embedding", f"{OURS}/class_token"),
        *norm_rows(f"{TOWER}.layernorm_pre", f"{OURS}/pre_norm"),
        *norm_rows(f"{TOWER}.layernorm_post", f"{OURS}/final_norm"),
        *position_rows(f"{TOWER}.gated_positional_embedding"),
    ]
    for name in ("pre_tile", "post_tile"):
        found.append(
            row(f"{TOWER}.{name}_positional_embedding.embedding.weight", f"{OURS}/{name}/table")
        )
        found.append(row(f"{TOWER}.{name}_positional_embedding.gate", f"{OURS}/{name}_gate"))
    for turn in range(vision.depth):
        found += block_rows(
            f"{TOWER}.transformer.layers.{turn}", f"{OURS}/blocks/layers/block_0", vision, turn
        )
    for turn in range(vision.num_global_layers):
        hub, ours = (
            f"{TOWER}.global_transformer.layers.{turn}",
            f"{OURS}/global_blocks/layers/block_0",
        )
        found += block_rows(hub, ours, vision, turn)
        found.append(row(f"{hub}.gate_attn", f"{ours}/self_gate", turn=turn))
        found.append(row(f"{hub}.gate_ffn", f"{ours}/mlp_gate", turn=turn))
    return found


def position_rows(hub: str) -> list[Row]:
    return [
        row(f"{hub}.embedding", f"{OURS}/positions"),
        row(f"{hub}.tile_embedding.weight", f"{OURS}/tile_positions/table"),
        row(f"{hub}.gate", f"{OURS}/positions_gate"),
    ]


def block_rows(hub: str, ours: str, vision: Vision, turn: int) -> list[Row]:
    return [
        *attention_rows(f"{hub}.self_attn", f"{ours}/self", vision, turn),
        *dense_rows(f"{hub}.mlp.fc1", f"{ours}/mlp/up", "F D -> D F", True, turn),
        *dense_rows(f"{hub}.mlp.fc2", f"{ours}/mlp/down", "D F -> F D", True, turn),
        *norm_rows(f"{hub}.input_layernorm", f"{ours}/self_norm", turn),
        *norm_rows(f"{hub}.post_attention_layernorm", f"{ours}/mlp_norm", turn),
    ]
