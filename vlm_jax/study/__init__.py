"""Controlled comparisons: one question, one base experiment, and arms that are named overrides."""

from vlm_jax.study.changes import override
from vlm_jax.study.contrasts import Contrast
from vlm_jax.study.definition import Study

__all__ = ["Contrast", "Study", "override"]
