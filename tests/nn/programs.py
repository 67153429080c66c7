"""Equations of a traced program, with the modules they belong to."""

from collections.abc import Iterator

from jax.extend import core


def equations(program: core.Jaxpr, module: str = "") -> Iterator[tuple[str, core.JaxprEqn]]:
    """Yields all equations, also of loops and functions, each with the path of its module."""
    for equation in program.eqns:
        inside = f"{module}/{equation.source_info.name_stack}"
        yield inside, equation
        for nested in core.jaxprs_in_params(equation.params):
            yield from equations(nested, inside)
