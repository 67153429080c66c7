"""Errors: mistakes that the user can correct, and runs that cannot continue."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can correct, in one sentence; commands print it and exit with 2."""


class ConfigError(UserError):
    """An invalid field, option or argument; names the valid choices."""


class DataError(UserError):
    """An image or a file of a dataset that is missing or cannot be read."""


class CheckpointError(UserError):
    """A folder of a public checkpoint that is missing, damaged or not supported."""


class RunError(RuntimeError):
    """A run that cannot continue, in one sentence that gives the reason."""

    on_all_processes = False  # whether every process of the run raises it at the same point


class NonFiniteError(RunError):
    """A number that became NaN or infinite: the run failed without a mistake of the user."""

    on_all_processes = True


@contextlib.contextmanager
def naming_source(name: str) -> Iterator[None]:
    """Names a source of `data.mixture` in an error of a user; "": there is no mixture."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise type(error)(f"data.mixture {name}: {error}") from error
