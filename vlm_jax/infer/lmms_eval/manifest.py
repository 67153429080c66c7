"""Registers vlm_jax in lmms-eval: the entry point `lmms_eval.models` of pyproject.toml."""

from lmms_eval.models.registry_v2 import ModelManifest

MODELS = "vlm_jax.infer.lmms_eval.models"
MANIFEST = ModelManifest("vlm_jax", f"{MODELS}.SimpleVlmJax", f"{MODELS}.ChatVlmJax")
