"""Combinations of settings that are refused, each in a sentence that names the fields."""

from vlm_jax.config.checks import data, images, model, training

CHECKS = (*data.CHECKS, *images.CHECKS, *model.CHECKS, *training.CHECKS)
