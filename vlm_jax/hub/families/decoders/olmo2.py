"""OLMo 2 (OLMo team 2024): Llama with norms of outputs, and of all query or key heads together."""

from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import Experiment
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.family import Family, Json, text_experiment

DEFAULTS = {"vocab_size": 50304, "rms_norm_eps": 1e-5}  # of Olmo2Config, where Llama's differ


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    config = DEFAULTS | llama.drop_nulls(config) | {"mlp_bias": False}
    decoder = llama.decoder_from_hf(config, llama.is_tied(config, names, False))
    return text_experiment(replace(decoder, norm_position="output", qk_norm="all_heads"))


def config_to_hf(cfg: Experiment) -> Json:
    config = llama.decoder_to_hf(cfg.decoder)
    config.pop("mlp_bias")
    return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", **config}


OLMO2 = Family("olmo2", config_from_hf, config_to_hf, llama.param_table, llama.RENAMES)
