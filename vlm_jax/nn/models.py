"""Which module a config builds, and its parameters: new ones, or their shapes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.config import Contrastive, Experiment, Vision
from vlm_jax.nn import contrastive
from vlm_jax.nn.vit import ViT
from vlm_jax.nn.vlm import VLM, example_batch, example_images

Config = (
    Experiment | Vision | Contrastive
)  # of a model with a decoder, of an encoder, of two towers
MODULES = {Experiment: VLM, Vision: ViT, Contrastive: contrastive.Contrastive}


def build_model(cfg: Config) -> nn.Module:
    return MODULES[type(cfg)](cfg)


def example_inputs(cfg: Config) -> tuple:
    """Zeros in the shape of what the model is called with."""
    if isinstance(cfg, Experiment):
        length = min(
            cfg.row_length, cfg.decoder.max_positions
        )  # a public model may have fewer positions
        return (example_batch(cfg, length=length),)
    if isinstance(cfg, Vision):
        return (example_images(cfg, 1)["images"][:, 0],)
    return (*example_inputs(cfg.vision), jnp.zeros((1, cfg.text.max_positions), jnp.int32))


@functools.cache
def initializer(cfg: Config) -> Callable:
    """From a key to the boxed parameters (`axes.Partitioned`) of a new model; jitted, so that one mesh traces it once."""
    return jax.jit(lambda key: build_model(cfg).init(key, *example_inputs(cfg))["params"])


@functools.cache
def abstract_params(cfg: Config):
    """Shapes and letters (`axes.Partitioned`) of the parameters; nothing is computed."""
    return jax.eval_shape(initializer(cfg), jax.eval_shape(jax.random.key, 0))
