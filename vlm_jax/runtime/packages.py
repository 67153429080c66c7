"""Optional packages, which files such as requirements-eval.txt list."""

import importlib.util

from vlm_jax.config import ConfigError


def check_installed(package: str, needed_by: str, requirements: str) -> None:
    """Checks that a package can be imported, without importing it.

    Args:
      needed_by: what needs it, in the message.
      requirements: the file that lists it.

    Raises:
      ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    # Without an origin it is a folder of this name, such as wandb's files of earlier runs.
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{needed_by} needs the package {package}: pip install -r {requirements}."
        )
