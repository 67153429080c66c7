"""Experiments as overrides of another experiment."""

from collections.abc import Mapping
from pathlib import Path

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.config.hints import nearest
from vlm_jax.config.validate import flat, kinds, with_fields

Overrides = Mapping[str, object]  # "section.field" -> value


def override(cfg: Experiment, overrides: Overrides) -> Experiment:
    """Returns the experiment with other values of some fields.

    Raises:
      ConfigError: a field does not exist.
    """
    # A mixture can be replaced whole, beside the fields of its sources.
    fields = {"data.mixture": tuple, **kinds(cfg)}
    for name in overrides:
        if name not in fields:
            raise ConfigError(f"field {name!r} does not exist{nearest(str(name), fields)}.")
    return with_fields(cfg, overrides)


def is_placeholder(value) -> bool:
    """Returns True for "{name}", the run of a prerequisite."""
    return isinstance(value, str) and value.startswith("{") and value.endswith("}")


def fill_placeholders(cfg: Experiment, folders: Mapping[str, Path]) -> Experiment:
    """Returns the experiment with a folder for every placeholder; `folders` has them by name."""
    filled = {
        name: str(folders[value[1:-1]])
        for name, value in flat(cfg).items()
        if is_placeholder(value)
    }
    return override(cfg, filled)
