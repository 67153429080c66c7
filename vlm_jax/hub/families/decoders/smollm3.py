"""SmolLM3 (Hugging Face 2025): Llama in which every fourth block has no RoPE (NoPE)."""

from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import CheckpointError, Experiment
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.family import Family, Json, get_or, positive_int, text_experiment

DEFAULTS = {  # of SmolLM3Config
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
}


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    config = DEFAULTS | llama.drop_nulls(config)
    decoder = llama.decoder_from_hf(config, llama.is_tied(config, names, True))
    decoder = replace(decoder, no_rope_layers=no_rope_layers(config, decoder.depth))
    window = config.get("sliding_window")
    slides = window is not None and get_or(config, "use_sliding_window", False)
    sliding = decoder.no_rope_layers if slides else ()
    return text_experiment(
        llama.with_sliding_window(
            decoder, window, llama.sliding_layers(config, decoder.depth, sliding)
        )
    )


def no_rope_layers(config: Json, depth: int) -> tuple[int, ...]:
    """Reads `no_rope_layers`, which has 1 for a block with RoPE and 0 for a block without."""
    interval = positive_int(config, "no_rope_layer_interval", 4)
    default = [int((i + 1) % interval > 0) for i in range(depth)]
    has_rope = get_or(config, "no_rope_layers", default)
    if not isinstance(has_rope, list) or len(has_rope) < depth or set(has_rope) - {0, 1}:
        raise CheckpointError(
            f"config.json: no_rope_layers is {has_rope!r}, but must be a list of 0 or 1 for each "
            f"of the {depth} layers."
        )
    return tuple(i for i in range(depth) if not has_rope[i])


def config_to_hf(cfg: Experiment) -> Json:
    decoder = cfg.decoder
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **llama.decoder_to_hf(decoder),
        "no_rope_layers": [int(i not in decoder.no_rope_layers) for i in range(decoder.depth)],
        "use_sliding_window": bool(decoder.sliding_layers),
        "sliding_window": decoder.sliding_window,
        "layer_types": llama.layer_types(decoder),
    }


SMOLLM3 = Family("smollm3", config_from_hf, config_to_hf, llama.param_table, llama.RENAMES)
