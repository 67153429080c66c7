"""Builds the module of a config, and its parameters: new ones, or their shapes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.config import Contrastive, Experiment, Model, Vision
from vlm_jax.nn import contrastive, lora
from vlm_jax.nn.vit import ViT
from vlm_jax.nn.vlm import VLM, example_batch, example_images

# Of a vision-language model (alone or in an experiment), an encoder, two contrastive towers.
Config = Experiment | Model | Vision | Contrastive
MODULES = {Model: VLM, Vision: ViT, Contrastive: contrastive.Contrastive}


def build_model(cfg: Config) -> nn.Module:
    cfg = model_config(cfg)
    return MODULES[type(cfg)](cfg)


def model_config(cfg: Config) -> Model | Vision | Contrastive:
    """Returns the config of the model: `Experiment.model`, or the config itself."""
    return cfg.model if isinstance(cfg, Experiment) else cfg


def example_inputs(cfg: Model | Vision | Contrastive) -> tuple:
    """Returns zeros in the shapes of a model's inputs, for its initialization."""
    if isinstance(cfg, Model):
        return (example_batch(cfg, length=1),)
    if isinstance(cfg, Vision):
        images = example_images(cfg, 1)
        if cfg.is_native:
            return images["images"], None, None, images["patch_images"], images["patch_places"]
        return (images["images"][:, 0],)
    return (*example_inputs(cfg.vision), jnp.zeros((1, cfg.text.max_positions), jnp.int32))


def initializer(cfg: Config) -> Callable:
    """Returns a jitted function: key -> boxed parameters (`axes.Partitioned`) of a new model."""
    return _initializer(model_config(cfg))


def abstract_params(cfg: Config):
    """Returns shapes and logical axes of the parameters (`axes.Partitioned`)."""
    return _abstract_params(model_config(cfg))


# Cached by the model, so that experiments that differ elsewhere share one trace.
@functools.cache
def _initializer(cfg: Model | Vision | Contrastive) -> Callable:
    def init(key):
        params = build_model(cfg).init(key, *example_inputs(cfg))["params"]
        return lora.with_adapters(cfg, params, key) if isinstance(cfg, Model) else params

    return jax.jit(init)


@functools.cache
def _abstract_params(cfg: Model | Vision | Contrastive):
    return jax.eval_shape(_initializer(cfg), jax.eval_shape(jax.random.key, 0))
