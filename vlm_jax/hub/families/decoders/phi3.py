"""Phi-3: Llama's block with fused projections, and longrope scaling."""

from collections.abc import Collection

from vlm_jax.config import CheckpointError, Decoder, Experiment
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get_or,
    text_experiment,
)
from vlm_jax.hub.families.table import Row, Target

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
OLD_NAMES = ("su", "yarn")  # of longrope in early files


def decoder_from_hf(config: Json, tied: bool) -> Decoder:
    """Reads the settings with Phi3Config's defaults; like transformers, ignores biases."""
    config = (
        DEFAULTS | _renamed(llama.drop_nulls(config)) | {"attention_bias": False, "mlp_bias": False}
    )
    decoder = llama.decoder_from_hf(config, tied)
    counts = {
        "short_factor": len(decoder.rope.short_factors),
        "long_factor": len(decoder.rope.long_factors),
    }
    for name, count in counts.items():
        if decoder.rope.scaling == "longrope" and count != decoder.rotary_dim // 2:
            raise CheckpointError(
                f"config.json: {name} has {count} factors, but a rotary dimension of "
                f"{decoder.rotary_dim} needs {decoder.rotary_dim // 2}."
            )
    window = config.get("sliding_window")
    return llama.with_sliding_window(decoder, window, range(decoder.depth) if window else ())


def _renamed(config: Json) -> Json:
    scaling = config.get("rope_scaling") or {}
    is_old = get_or(scaling, "rope_type", scaling.get("type")) in OLD_NAMES
    return config | {"rope_scaling": scaling | {"rope_type": "longrope"}} if is_old else config


def decoder_to_hf(decoder: Decoder) -> Json:
    config = llama.decoder_to_hf(decoder)
    for key in ("attention_bias", "mlp_bias"):
        config.pop(key)
    return config | {
        "partial_rotary_factor": decoder.rope.fraction,
        "sliding_window": decoder.sliding_window,
    }


def block_rows(hf: str, param: str, decoder: Decoder, layer: int) -> list[Row]:
    qkv = {"query": "(N H) D -> D N H", "key": "(K H) D -> D K H", "value": "(K H) D -> D K H"}
    parts = [Target(f"{param}/self/{name}/kernel", pattern, layer) for name, pattern in qkv.items()]
    gate_up = [Target(f"{param}/mlp/{name}/kernel", "F D -> D F", layer) for name in ("gate", "up")]
    return [
        Row(f"{hf}.self_attn.qkv_proj.weight", tuple(parts)),
        *llama.dense_rows(
            f"{hf}.self_attn.o_proj", f"{param}/self/out", "D (N H) -> N H D", False, layer
        ),
        Row(f"{hf}.mlp.gate_up_proj.weight", tuple(gate_up)),
        *llama.dense_rows(f"{hf}.mlp.down_proj", f"{param}/mlp/down", "D F -> F D", False, layer),
        *llama.block_norm_rows(hf, param, decoder, layer),
    ]


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    return text_experiment(decoder_from_hf(config, llama.is_tied(config, names, False)))


def config_to_hf(cfg: Experiment) -> Json:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **decoder_to_hf(cfg.decoder),
    }


def param_table(cfg: Experiment) -> list[Row]:
    return llama.decoder_rows(cfg.decoder, cfg.fusion, block_rows=block_rows)


PHI3 = Family("phi3", config_from_hf, config_to_hf, param_table, llama.RENAMES)
