"""Converts errors to exit codes and messages."""

import traceback

from vlm_jax.config import RunError, UserError
from vlm_jax.runtime import preemption


def describe_failure(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and the message of an error; prints the traceback of an unexpected
    one."""
    match error:
        case UserError():
            return 2, f"error: {error}"
        # An OSError, such as a full disk, names its file.
        case OSError() | RunError():
            return 1, f"error: {error}"
        case ModuleNotFoundError():
            return 2, (
                f"error: the package {error.name} is not installed: "
                "pip install -r requirements.txt."
            )
        case preemption.Preempted():
            return preemption.RESUME_ME, str(error)
        case KeyboardInterrupt():
            return 130, "stopped"
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        reason = str(error).splitlines()[0]
        return 1, (
            f"error: the run cannot go on ({reason}): if another process ended, see the output of "
            "the process that ended."
        )
    traceback.print_exception(error)
    return 1, f"error: {type(error).__name__}: {error}"
