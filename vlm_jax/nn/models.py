"""Which module a config builds, and the shapes of its parameters."""

import functools

import jax
from flax import linen as nn

from vlm_jax.config import Experiment, Vision
from vlm_jax.nn.vit import ViT
from vlm_jax.nn.vlm import VLM, example_batch, example_images

Config = Experiment | Vision


def model_of(cfg: Config) -> nn.Module:
    """A VLM for an experiment, a ViT for an encoder alone."""
    return ViT(cfg) if isinstance(cfg, Vision) else VLM(cfg)


def example_inputs(cfg: Config) -> tuple:
    """Zeros in the shape of what the model is called with."""
    if isinstance(cfg, Vision):
        return (example_images(cfg, 1)["images"][:, 0],)
    return (example_batch(cfg),)


@functools.cache
def boxed_params(cfg: Config):
    """Shapes and letters (`axes.Lettered`) of the parameters; nothing is computed, and the model is traced once."""
    return jax.eval_shape(lambda: model_of(cfg).init(jax.random.key(0), *example_inputs(cfg))["params"])
