"""Groups of rows. Only a group's process imports JAX, and with it the modules of its rows."""

import traceback
from collections.abc import Callable

DEVICE = "Device"
# Names of a group are TABLE or TABLE:MODEL; the most important come first.
CHECKS = ("Attention", "Tokens", "Resume")
MEASUREMENTS = (
    "Training step:unified 0.4B",
    "Training step:unified 1B",
    "Generation:unified 1B",
    "Training step:cross_attention 0.4B",
    "Training step:cross_attention 1B",
    "Generation:cross_attention 1B",
)
TINY_MEASUREMENTS = ("Training step:unified tiny", "Generation:unified tiny")
# Returns the values of a row; `passed`, if it is a check, tells whether it holds.
Task = Callable[[], dict]


def names(is_tiny: bool) -> tuple[str, ...]:
    return CHECKS + (TINY_MEASUREMENTS if is_tiny else MEASUREMENTS)


def tasks(group: str, is_tiny: bool) -> dict[str, Task]:
    """Returns the rows of a group by name, none of them computed yet."""
    table, _, model = group.partition(":")
    if table == DEVICE:
        from on_device import facts

        return {"facts": facts.collect}
    if table == "Attention":
        from on_device import attention

        return attention.tasks(is_tiny)
    if table == "Tokens":
        from on_device import tokens

        return tokens.tasks(is_tiny)
    if table == "Resume":
        from on_device import training

        return {"two steps after a checkpoint": training.resume}
    kind, size = model.split()
    if table == "Training step":
        from on_device import training

        return training.Step(kind, size).tasks()
    from on_device import generation

    return generation.Speed(kind, size).tasks()


def run_task(task: Task) -> tuple[str, dict]:
    """Returns the status and the values of a row; an exception is a row, too.

    NaN becomes None, which JSON has.
    """
    try:
        values = task()
    # Compilers, kernels and allocators raise any exception.
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        return "error", {"error": message}
    values = {name: None if value != value else value for name, value in values.items()}
    passed = values.pop("passed", None)
    if passed is None:
        return "measured", values
    return ("passed" if passed else "failed"), values
