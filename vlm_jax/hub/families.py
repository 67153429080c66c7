"""The families that are known, by the `model_type` of their config.json."""

from collections.abc import Mapping

from vlm_jax.config import ConfigError
from vlm_jax.hub import gpt2, llama
from vlm_jax.hub.family import Family

FAMILIES = {family.model_type: family for family in (gpt2.GPT2, llama.LLAMA, llama.MISTRAL, llama.QWEN2)}


def family_of(config: Mapping, name: str) -> Family:
    """The family of a config.json; `name` says whose it is. ConfigError lists the known ones."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"{name}: model_type {kind!r} is not supported: choose {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[kind]
