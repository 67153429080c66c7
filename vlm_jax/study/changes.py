"""Experiments as differences from another one."""

from collections.abc import Mapping
from pathlib import Path

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.config.hints import nearest
from vlm_jax.config.validate import flat, kinds, with_fields

Differences = Mapping[str, object]  # "section.field" -> value


def changed(cfg: Experiment, differences: Differences) -> Experiment:
    """The experiment with other values of some fields.

    Raises:
      ConfigError: no such field.
    """
    known = kinds(cfg)
    for name in differences:
        if name not in known:
            raise ConfigError(f"{name!r} is no field{nearest(str(name), known)}.")
    return with_fields(cfg, differences)


def is_placeholder(value) -> bool:
    """Whether a value stands for the exported folder of a run of `Study.first`."""
    return isinstance(value, str) and value.startswith("{") and value.endswith("}")


def with_exports(cfg: Experiment, folders: Mapping[str, Path]) -> Experiment:
    """The experiment with every placeholder replaced by the folder that it stands for."""
    found = {
        name: str(folders[value[1:-1]])
        for name, value in flat(cfg).items()
        if is_placeholder(value)
    }
    return changed(cfg, found)
