"""What a traced program does, and which module does it."""

from collections.abc import Iterator

from jax.extend import core


def equations(program: core.Jaxpr, module: str = "") -> Iterator[tuple[str, core.JaxprEqn]]:
    """All equations, those in loops and functions among them, each with the path of the module that it is of."""
    for equation in program.eqns:
        inside = f"{module}/{equation.source_info.name_stack}"
        yield inside, equation
        for nested in core.jaxprs_in_params(equation.params):
            yield from equations(nested, inside)
