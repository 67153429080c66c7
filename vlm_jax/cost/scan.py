"""The inputs of a traced `jax.lax.scan`, for counts of FLOPs and of memory."""


def carried_inputs(params: dict) -> slice:
    """Returns the positions of the inputs that a scan replaces at every iteration.

    The inputs before them are constants, and a slice of each input after them is read at every
    iteration.

    Args:
      params: of the scan's equation. JAX 0.11 has a tree of all inputs instead of two numbers.
    """
    if "ft_in" in params:
        constants, carries, _ = params["ft_in"].unpack()
        return slice(len(constants), len(constants) + len(carries))
    return slice(params["num_consts"], params["num_consts"] + params["num_carry"])
