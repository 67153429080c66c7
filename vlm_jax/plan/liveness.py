"""The most that a traced program (a jaxpr) holds at once, by the lives of its values.

A value lives from the operation that makes it to the last one that reads it. What XLA fuses is not held: a value that
is computed number by number lives on as what it is computed from, unless a loop takes it in. A loop holds what it
stacks over its turns, and in a turn what its body holds, with the slices that more than fused operations read.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jax.extend import core

FUSED = {  # primitives whose result XLA computes where it is read
    "add", "add_any", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "tanh", "logistic", "erf", "rsqrt",
    "sqrt", "square", "integer_pow", "pow", "sign", "abs", "select_n", "convert_element_type", "broadcast_in_dim",
    "reshape", "squeeze", "expand_dims", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "iota",
    "stop_gradient", "copy", "is_finite", "clamp", "rem", "floor", "slice", "name", "sharding_constraint",
    "optimization_barrier", "transpose", "cos", "sin", "exp2", "log1p", "pad", "dynamic_slice", "rev",
}  # fmt: skip


CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat2",
}
LOOPS = {"scan", "while", "cond"}
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add"}  # written into their first input
ONE_OF = IN_PLACE | {"optimization_barrier"}  # their n-th result is their n-th input
ON_ROWS = {
    "dot_general",
    "gather",
    "scatter-add",
    "reduce_sum",
}  # between a batch's rows and parameters
Split = Callable[[tuple[int, ...]], int]  # shape -> devices that share an array of it


@dataclass(eq=False)
class Value:
    """An array of the program; one program that is called twice makes two of each of its arrays."""

    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class Operation:
    name: str
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]
    carried: tuple[Value, ...]  # of a loop: what it reads to change it turn by turn
    params: dict


def peak_bytes(program: core.Jaxpr, split: Split, slices: int = 0) -> float:
    """Peak of what `program` makes; what goes into it is held by who calls it, and written over in place.

    Args:
      slices: how many of its inputs, the last ones, are slices that are cut out for it.
    """
    inputs = [_value(var) for var in program.invars]
    operations, outputs = _flat(program, inputs)
    readers = _readers(operations)
    _widen(operations, readers)
    cut = inputs[len(inputs) - slices :]
    held_from = {
        value: 0 for value in cut if not {reader.name for reader in readers[value]} <= FUSED
    }
    last = _lives(operations, outputs, held_from, _kept(operations, readers))
    return _sweep(operations, held_from, last, split)


def _sweep(
    operations: list[Operation], held_from: dict[Value, int], last: dict[Value, int], split: Split
) -> float:
    change = [0.0] * (len(operations) + 1)
    for value, start in held_from.items():
        if value in last:
            size = _bytes(value) / split(value.shape)
            change[start] += size
            change[last[value] + 1] -= size
    now = peak = 0.0
    for operation, difference in zip(operations, change):
        now += difference
        peak = max(peak, now + _inside(operation, split) + _whole(operation, split))
    return peak


def _whole(operation: Operation, split: Split) -> float:
    """What of shared arrays a device holds besides its share while an operation on rows reads or makes one.

    It reads the whole, gathered before; and it makes a whole one of its own rows, which then is summed up over the
    devices before each takes its share: two more.
    """
    if operation.name not in ON_ROWS:
        return 0.0
    values = (*operation.reads, *(value for value in operation.makes for _ in range(2)))
    return sum(_bytes(value) * (1 - 1 / split(value.shape)) for value in values)


def _bytes(value: Value) -> int:
    return math.prod(value.shape) * value.itemsize


def _inside(operation: Operation, split: Split) -> float:
    """Peak within one turn of a loop."""
    if operation.name not in LOOPS:
        return 0.0
    carried, constant = (operation.params.get(name, 0) for name in ("num_carry", "num_consts"))
    gathered = 0.0
    if (
        operation.name == "while"
    ):  # what every turn of a chunked loss reads is gathered before it, and stays
        constant_values = (value for value in operation.reads if value not in operation.carried)
        gathered = sum(_bytes(value) * (1 - 1 / split(value.shape)) for value in constant_values)
    peaks = []
    for program in core.jaxprs_in_params(operation.params):
        slices = len(program.invars) - carried - constant if operation.name == "scan" else 0
        peaks.append(peak_bytes(program, split, slices))
    return gathered + max(peaks)


def _readers(operations: list[Operation]) -> dict[Value, list[Operation]]:
    readers = defaultdict(list)
    for operation in operations:
        for value in operation.reads:
            readers[value].append(operation)
    return readers


def _widen(operations: list[Operation], readers: dict[Value, list[Operation]]) -> None:
    """A product in bfloat16 that is read in float32 is made in float32: XLA keeps what it has summed up."""
    for operation in operations:
        for value in operation.makes if operation.name == "dot_general" else ():
            into = [result.itemsize for reader in readers[value] for result in reader.makes]
            if {reader.name for reader in readers[value]} == {"convert_element_type"}:
                value.itemsize = max(into)


def _kept(operations: list[Operation], readers: dict[Value, list[Operation]]) -> set[Value]:
    """Results of fused operations that are held all the same.

    What a loop takes in, what stands before a barrier, and an exponential that is summed up and read again, as in
    softmax: XLA computes it once.
    """
    stored = LOOPS | {"optimization_barrier"}
    kept = {
        value for operation in operations if operation.name in stored for value in operation.reads
    }
    for operation in operations:
        for value in operation.makes if operation.name == "exp" else ():
            names = {reader.name for reader in readers[value]}
            if "reduce_sum" in names and len(names) > 1:
                kept.add(value)
    return kept


def _lives(
    operations: list[Operation],
    outputs: list[Value],
    held_from: dict[Value, int],
    taken: set[Value],
) -> dict[Value, int]:
    """Value -> index of the operation that reads it last, by way of fused ones, too; notes in `held_from` what is held.

    What is in `taken` is held, even where a fused operation makes it.
    """
    roots: dict[Value, tuple[Value, ...]] = {}
    last: dict[Value, int] = {}

    def read(values: Iterable[Value], i: int):
        last.update((root, i) for value in values for root in roots.get(value, (value,)))

    for i, operation in enumerate(operations):
        read(operation.reads, i)
        for place, value in enumerate(operation.makes):
            sources = (
                operation.reads[place : place + 1] if operation.name in ONE_OF else operation.reads
            )
            found = tuple({root for source in sources for root in roots.get(source, (source,))})
            is_in_place = operation.name in IN_PLACE and found
            if is_in_place or (operation.name in FUSED and value not in taken):
                roots[value] = found
            else:
                held_from[value] = i
    read(outputs, len(operations) - 1)
    for i, operation in enumerate(operations):
        for value in operation.carried:
            if value in held_from and last[value] == i:
                last[value] = i - 1  # the loop's result lies in its place
    return last


def _carried(equation) -> list:
    """What a loop takes in to change it turn by turn."""
    params, name = equation.params, equation.primitive.name
    if name == "scan":
        return equation.invars[params["num_consts"] :][: params["num_carry"]]
    return (
        equation.invars[params["cond_nconsts"] + params["body_nconsts"] :]
        if name == "while"
        else []
    )


def _flat(program: core.Jaxpr, inputs: list[Value]) -> tuple[list[Operation], list[Value]]:
    """The operations of a program and its results, with the programs that it calls in place of the calls."""
    values: dict = dict(zip(program.invars, inputs))
    operations: list[Operation] = []

    def known(variables):
        return [
            values.setdefault(var, _value(var))
            for var in variables
            if not isinstance(var, core.Literal)
        ]

    for equation in program.eqns:
        name = equation.primitive.name
        if name not in CALLS:
            makes = tuple(values.setdefault(var, _value(var)) for var in equation.outvars)
            reads, carried = (
                tuple(known(values)) for values in (equation.invars, _carried(equation))
            )
            operations.append(Operation(name, reads, makes, carried, equation.params))
            continue
        called = next(iter(core.jaxprs_in_params(equation.params)))
        given = [
            _value(var) if isinstance(var, core.Literal) else known([var])[0]
            for var in equation.invars
        ]
        inner, results = _flat(called, given)
        operations += inner
        values.update(zip(equation.outvars, results))
    return operations, [
        _value(var) if isinstance(var, core.Literal) else known([var])[0] for var in program.outvars
    ]


def _value(var) -> Value:
    dtype = getattr(var.aval, "dtype", None)
    return Value(getattr(var.aval, "shape", ()), getattr(dtype, "itemsize", 0))
