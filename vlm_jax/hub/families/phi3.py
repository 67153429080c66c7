"""Phi-3: Llama's block with fused projections, and RoPE that has other angles for long texts."""

from collections.abc import Collection

from vlm_jax.config import CheckpointError, Decoder, Experiment
from vlm_jax.hub.families import llama
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get,
    text_experiment,
)
from vlm_jax.hub.families.table import Part, Row

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
OLD_NAMES = ("su", "yarn")  # of longrope, in the first files


def read_decoder(config: Json, tied: bool) -> Decoder:
    """The settings of a Phi-3 with the defaults of Phi3Config; nothing has a bias, whatever config.json says."""
    config = DEFAULTS | _renamed(llama.given(config)) | {"attention_bias": False, "mlp_bias": False}
    decoder = llama.read_decoder(config, tied)
    counts = {
        "short_factor": len(decoder.rope.short_factors),
        "long_factor": len(decoder.rope.long_factors),
    }
    for name, count in counts.items():
        if decoder.rope.scaling == "longrope" and count != decoder.rotary_dim // 2:
            raise CheckpointError(
                f"config.json: {name} has {count} numbers; a head whose first {decoder.rotary_dim} numbers RoPE turns "
                f"needs {decoder.rotary_dim // 2}."
            )
    window = get(config, "sliding_window", 0)
    return llama.slide(decoder, window, range(decoder.depth) if window else ())


def _renamed(config: Json) -> Json:
    scaling = config.get("rope_scaling") or {}
    is_old = get(scaling, "rope_type", scaling.get("type")) in OLD_NAMES
    return config | {"rope_scaling": scaling | {"rope_type": "longrope"}} if is_old else config


def write_decoder(decoder: Decoder) -> Json:
    config = llama.write_decoder(decoder)
    for key in ("attention_bias", "mlp_bias"):
        config.pop(key)
    return config | {
        "partial_rotary_factor": decoder.rope.fraction,
        "sliding_window": decoder.sliding_window or None,
    }


def block_rows(hub: str, ours: str, decoder: Decoder, turn: int) -> list[Row]:
    qkv = {"query": "(N H) D -> D N H", "key": "(K H) D -> D K H", "value": "(K H) D -> D K H"}
    parts = [Part(f"{ours}/self/{name}/kernel", pattern, turn) for name, pattern in qkv.items()]
    gate_up = [Part(f"{ours}/mlp/{name}/kernel", "F D -> D F", turn) for name in ("gate", "up")]
    return [
        Row(f"{hub}.self_attn.qkv_proj.weight", tuple(parts)),
        *llama.dense_rows(
            f"{hub}.self_attn.o_proj", f"{ours}/self/out", "D (N H) -> N H D", False, turn
        ),
        Row(f"{hub}.mlp.gate_up_proj.weight", tuple(gate_up)),
        *llama.dense_rows(f"{hub}.mlp.down_proj", f"{ours}/mlp/down", "D F -> F D", False, turn),
        *llama.block_norm_rows(hub, ours, turn),
    ]


def read(config: Json, names: Collection[str]) -> Experiment:
    return text_experiment(read_decoder(config, llama.is_tied(config, names, False)))


def write(cfg: Experiment) -> Json:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **write_decoder(cfg.decoder),
    }


def rows(cfg: Experiment) -> list[Row]:
    return llama.decoder_rows(cfg.decoder, cfg.fusion, block_rows=block_rows)


PHI3 = Family("phi3", read, write, rows, llama.RENAMES)
