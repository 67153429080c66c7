"""Controlled comparisons: one question, one base, arms that are named differences, and all else held fixed."""

from vlm_jax.study.changes import changed
from vlm_jax.study.definition import Study

__all__ = ["Study", "changed"]
