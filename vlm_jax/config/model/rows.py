"""Rows of the tables of projectors and fusion styles."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.config.errors import ConfigError


def get_row(table: Mapping[str, Any], name: str, kind: str):
    """Returns the row of a table that field `name` chooses.

    Raises:
      ConfigError: the table has no such row.
    """
    if kind not in table:
        raise ConfigError(f"{name} {kind!r} is not a valid choice: choose {', '.join(table)}.")
    return table[kind]
