"""Gemma 1, 2 and 3 (text): Llama's block with zero-centered norms and scaled embeddings."""

from collections.abc import Callable, Collection
from dataclasses import replace

from vlm_jax.config import Decoder, Experiment
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get_or,
    positive_int,
    positive_number,
    reject_unless,
    text_experiment,
)

GEMMA_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}
GEMMA2_DEFAULTS = GEMMA_DEFAULTS | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3_DEFAULTS = GEMMA2_DEFAULTS | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
TOLERANCE = 3e-4  # of logits: the scales of the final norm are large


def gemma_from_hf(config: Json, tied: bool) -> Decoder:
    """Reads Gemma's settings. "gelu" in its first files means the tanh approximation."""
    activation = get_or(config, "hidden_act", "gelu")
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    return _read_shared(
        GEMMA_DEFAULTS | llama.drop_nulls(config) | {"hidden_act": activation}, tied
    )


def gemma2_from_hf(config: Json, tied: bool) -> Decoder:
    """Reads Gemma 2's settings: even blocks use a sliding window; null turns a softcap off."""
    return replace(
        _read_with_both_norms(GEMMA2_DEFAULTS | llama.drop_nulls(config), tied, every=2),
        score_softcap=config.get("attn_logit_softcapping", 50.0) or None,
        logit_softcap=config.get("final_logit_softcapping", 30.0) or None,
    )


def gemma3_from_hf(config: Json, tied: bool) -> Decoder:
    """Reads Gemma 3's settings: five of six blocks have a sliding window and their own RoPE."""
    config = GEMMA3_DEFAULTS | llama.drop_nulls(config)
    decoder = _read_with_both_norms(
        config, tied, every=positive_int(config, "sliding_window_pattern")
    )
    local = get_or(config, "rope_parameters", {}).get("sliding_attention") or {}
    reject_unless(local, "rope_type", "default")
    local_theta = float(get_or(local, "rope_theta", config["rope_local_base_freq"]))
    return replace(
        decoder,
        qk_norm="head",
        logit_softcap=config.get("final_logit_softcapping") or None,
        rope=replace(decoder.rope, local_theta=local_theta),
    )


def _read_shared(config: Json, tied: bool) -> Decoder:
    reject_unless(config, "use_bidirectional_attention", False)
    decoder = llama.decoder_from_hf(config | {"mlp_bias": False}, tied)
    return replace(decoder, norm="rmsnorm_zero_centered", embed_scale=True)


def _read_with_both_norms(config: Json, tied: bool, every: int) -> Decoder:
    """Reads the settings that Gemma 2 and 3 share; every n-th block has no sliding window."""
    decoder = _read_shared(config | {"hidden_act": config["hidden_activation"]}, tied)
    scalar = positive_number(config, "query_pre_attn_scalar")
    query_scale = None if scalar == decoder.head_width else scalar**-0.5
    local = [i for i in range(decoder.depth) if (i + 1) % every]
    decoder = replace(decoder, norm_position="sandwich", query_scale=query_scale)
    return llama.with_sliding_window(
        decoder, config["sliding_window"], llama.sliding_layers(config, decoder.depth, local)
    )


def gemma_to_hf(decoder: Decoder) -> Json:
    config = llama.decoder_to_hf(decoder)
    config.pop("mlp_bias")
    return config | {"hidden_activation": config["hidden_act"]}


def gemma2_to_hf(decoder: Decoder) -> Json:
    if decoder.query_scale is None:
        scalar = decoder.head_width
    else:
        scalar = round(decoder.query_scale**-2, 6)
    return gemma_to_hf(decoder) | {
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": decoder.score_softcap,
        "final_logit_softcapping": decoder.logit_softcap,
        "sliding_window": decoder.sliding_window or GEMMA2_DEFAULTS["sliding_window"],
        "layer_types": llama.layer_types(decoder),
    }


def gemma3_to_hf(decoder: Decoder) -> Json:
    """Writes `layer_types` and, if the layers follow one, the pattern (transformers < 4.53)."""
    config = gemma2_to_hf(decoder) | {"rope_local_base_freq": decoder.rope.local_theta}
    local = decoder.sliding_layers
    every = next((i for i in range(decoder.depth) if i not in local), decoder.depth) + 1
    if local == tuple(i for i in range(decoder.depth) if (i + 1) % every):
        config["sliding_window_pattern"] = every
    return config


def family(
    model_type: str,
    architecture: str,
    decoder_from_hf: Callable[[Json, bool], Decoder],
    decoder_to_hf: Callable[[Decoder], Json],
) -> Family:
    """Builds a Gemma family. The head is tied by default."""

    def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
        return text_experiment(decoder_from_hf(config, llama.is_tied(config, names, True)))

    def config_to_hf(cfg: Experiment) -> Json:
        return {
            "architectures": [architecture],
            "model_type": model_type,
            **decoder_to_hf(cfg.decoder),
        }

    return Family(
        model_type, config_from_hf, config_to_hf, llama.param_table, llama.RENAMES, TOLERANCE
    )


GEMMA = family("gemma", "GemmaForCausalLM", gemma_from_hf, gemma_to_hf)
GEMMA2 = family("gemma2", "Gemma2ForCausalLM", gemma2_from_hf, gemma2_to_hf)
GEMMA3 = family("gemma3_text", "Gemma3ForCausalLM", gemma3_from_hf, gemma3_to_hf)
