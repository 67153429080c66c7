"""Peak memory of a traced program (a jaxpr), from the lifetimes of its values.

A value lives from the operation that creates it to the last one that reads it. The result of a
fused operation takes no memory: it is computed again from its sources, which live on instead,
unless a loop takes it as an input. A loop holds what it stacks over its iterations and, during one
iteration, what its body holds, with the slices that operations other than fused ones read.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jax.extend import core

from vlm_jax.cost.scan import carried_inputs

# Primitives that XLA fuses into the operation that reads their result.
FUSED = {
    "add", "add_any", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "tanh",
    "logistic", "erf", "rsqrt", "sqrt", "square", "integer_pow", "pow", "sign", "abs",
    "select_n", "convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims",
    "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "iota", "stop_gradient", "copy",
    "is_finite", "clamp", "rem", "floor", "slice", "name", "sharding_constraint",
    "optimization_barrier", "transpose", "cos", "sin", "exp2", "log1p", "pad", "dynamic_slice",
    "rev", "shift_right_logical",
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
# Operations that overwrite their first input, and those whose n-th result is their n-th input.
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add"}
ALIASING = IN_PLACE | {"optimization_barrier"}
# Operations that only change an array's layout.
LAYOUT = {"transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims"}
# Operations between a batch's rows and parameters, which are gathered from their shards first.
# Not a lookup in an embedding table, for which devices exchange the rows found.
ROW_OPERATIONS = {"dot_general", "reduce_sum"}
Split = Callable[[tuple[int, ...]], int]  # shape -> number of devices that share an array of it


@dataclass(frozen=True)
class Target:
    """The devices that a program is compiled for."""

    split: Split
    #: The compiler gathers the float32 operands of a matmul in bfloat16, in which it multiplies
    #: them, and adds a matmul to the carried array of a loop in its place.
    is_tpu: bool = False
    summed_parts: int = 1  # in which gradients are summed over devices (`axes.sum_rows`)


@dataclass(eq=False)
class Value:
    """An array of the program; two calls of one function have separate values."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def gathered_bytes(self, split: Split) -> float:
        """Bytes of the shards of other devices, which a gather adds to this device's own."""
        return self.bytes * (1 - 1 / split(self.shape))


@dataclass(frozen=True)
class Operation:
    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    carried: tuple[Value, ...]  # inputs of a loop that it replaces at every iteration
    params: dict


Readers = dict[Value, list[Operation]]


def peak_bytes(program: core.Jaxpr, target: Target, slices: int = 0) -> float:
    """Peak memory of the values that `program` creates; its inputs are owned by the caller.

    Args:
      slices: number of inputs, the last ones, that are slices of an array, cut for the program.
    """
    inputs = [_value(var) for var in program.invars]
    operations, outputs = _flatten(program, inputs)
    readers = _readers(operations)
    _widen_accumulators(operations, readers)
    # A slice that only fused operations read is never stored.
    created_at = {}
    for value in inputs[len(inputs) - slices :]:
        if not _reader_names(value, readers) <= FUSED:
            created_at[value] = 0
    added = _added_in_place(operations, inputs, outputs, readers) if target.is_tpu else set()
    materialized = _materialized(operations, readers)
    last_read = _lifetimes(operations, outputs, created_at, materialized, added)
    return _sweep(operations, created_at, last_read, target)


def _sweep(
    operations: list[Operation],
    created_at: dict[Value, int],
    last_read: dict[Value, int],
    target: Target,
) -> float:
    """Highest sum of live bytes over all operations, with the memory used inside of each."""
    change = [0.0] * (len(operations) + 1)
    for value, start in created_at.items():
        if value in last_read:
            size = value.bytes / target.split(value.shape)
            change[start] += size
            change[last_read[value] + 1] -= size
    live = peak = 0.0
    for operation, difference in zip(operations, change):
        live += difference
        inside = _loop_body_peak(operation, target) + _gathered_bytes(operation, target)
        peak = max(peak, live + inside)
    return peak


def _gathered_bytes(operation: Operation, target: Target) -> float:
    """Memory for the other devices' shards while an operation on rows runs.

    Inputs are gathered first. A result is a whole array of this device's rows, which is then summed
    over the devices before each keeps its shard: two more. A sum over an axis of one is its input,
    and the sum over devices is in parts.
    """
    if operation.name not in ROW_OPERATIONS:
        return 0.0
    inputs = sum(value.gathered_bytes(target.split) for value in operation.inputs)
    outputs = sum(value.gathered_bytes(target.split) for value in operation.outputs)
    if operation.name == "dot_general":
        return inputs + 2 * outputs
    is_input = math.prod(operation.inputs[0].shape) == math.prod(operation.outputs[0].shape)
    own = 0 if is_input else outputs
    return inputs + own + outputs / target.summed_parts


def _loop_body_peak(operation: Operation, target: Target) -> float:
    """Peak memory within one iteration of a loop."""
    if operation.name not in LOOPS:
        return 0.0
    gathered = 0.0
    # The constants of a chunked loss's loop are gathered before it, and stay; all that its body
    # creates is of this device's rows, and whole.
    if operation.name == "while":
        constants = (value for value in operation.inputs if value not in operation.carried)
        gathered = sum(value.gathered_bytes(target.split) for value in constants)
        if target.is_tpu:
            gathered /= 2
        target = replace(target, split=lambda shape: 1)
    peaks = []
    for program in core.jaxprs_in_params(operation.params):
        slices = 0
        if operation.name == "scan":
            slices = len(program.invars) - carried_inputs(operation.params).stop
        peaks.append(peak_bytes(program, target, slices))
    return gathered + max(peaks)


def _readers(operations: list[Operation]) -> Readers:
    readers = defaultdict(list)
    for operation in operations:
        for value in operation.inputs:
            readers[value].append(operation)
    return readers


def _reader_names(value: Value, readers: Readers) -> set[str]:
    return {reader.name for reader in readers[value]}


def _widen_accumulators(operations: list[Operation], readers: Readers) -> None:
    """Gives matmuls that are only converted the size of the converted result.

    XLA keeps the float32 accumulator of a bfloat16 matmul that is read as float32.
    """
    for operation in operations:
        if operation.name != "dot_general":
            continue
        for value in operation.outputs:
            if _reader_names(value, readers) == {"convert_element_type"}:
                results = [result for reader in readers[value] for result in reader.outputs]
                value.itemsize = max(result.itemsize for result in results)


def _materialized(operations: list[Operation], readers: Readers) -> set[Value]:
    """Results of fused operations that are stored nevertheless.

    These are the inputs of loops and barriers, and an exponential that is summed and read again, as
    in softmax: XLA computes it once.
    """
    stored = LOOPS | {"optimization_barrier"}
    values = set()
    for operation in operations:
        if operation.name in stored:
            values.update(operation.inputs)
        elif operation.name == "exp":
            for value in operation.outputs:
                names = _reader_names(value, readers)
                if "reduce_sum" in names and len(names) > 1:
                    values.add(value)
    return values


def _added_in_place(
    operations: list[Operation], inputs: list[Value], outputs: list[Value], readers: Readers
) -> set[Value]:
    """Results of matmuls that a loop's body only adds to one of its inputs and returns."""
    added = set()
    for operation in operations:
        value = operation.outputs[0] if operation.name == "dot_general" else None
        while value is not None and len(readers[value]) == 1:
            (reader,) = readers[value]
            is_returned = reader.name == "add" and reader.outputs[0] in outputs
            if is_returned and any(other in inputs for other in reader.inputs):
                added.add(operation.outputs[0])
            value = reader.outputs[0] if reader.name in LAYOUT else None
    return added


def _lifetimes(
    operations: list[Operation],
    outputs: list[Value],
    created_at: dict[Value, int],
    materialized: set[Value],
    added_in_place: set[Value],
) -> dict[Value, int]:
    """Returns value -> index of the operation that reads it last, directly or through fused ones.

    Adds the values that are stored to `created_at`.
    """
    sources: dict[Value, tuple[Value, ...]] = {}  # value that is not stored -> stored values
    last_read: dict[Value, int] = {}

    def stored(values: Iterable[Value]) -> set[Value]:
        roots: set[Value] = set()
        for value in values:
            roots.update(sources.get(value, (value,)))
        return roots

    for i, operation in enumerate(operations):
        last_read.update(dict.fromkeys(stored(operation.inputs), i))
        for position, value in enumerate(operation.outputs):
            inputs = operation.inputs
            if operation.name in ALIASING:
                inputs = inputs[position : position + 1]
            roots = tuple(stored(inputs))
            is_in_place = (operation.name in IN_PLACE and roots) or value in added_in_place
            if is_in_place or (operation.name in FUSED and value not in materialized):
                sources[value] = roots
            else:
                created_at[value] = i
    last_read.update(dict.fromkeys(stored(outputs), len(operations) - 1))
    # The result of a loop takes the place of the carried input.
    for i, operation in enumerate(operations):
        for value in operation.carried:
            if value in created_at and last_read[value] == i:
                last_read[value] = i - 1
    return last_read


def _carried(equation) -> list:
    """Inputs of a loop that it replaces at every iteration."""
    params, name = equation.params, equation.primitive.name
    if name == "scan":
        return equation.invars[carried_inputs(params)]
    if name == "while":
        return equation.invars[params["cond_nconsts"] + params["body_nconsts"] :]
    return []


def _flatten(program: core.Jaxpr, inputs: list[Value]) -> tuple[list[Operation], list[Value]]:
    """Returns the operations of a program and its outputs, with all calls inlined."""
    values: dict = dict(zip(program.invars, inputs))
    operations: list[Operation] = []

    def known(var) -> Value:
        return _value(var) if isinstance(var, core.Literal) else values.setdefault(var, _value(var))

    def known_arrays(variables) -> tuple[Value, ...]:
        return tuple(known(var) for var in variables if not isinstance(var, core.Literal))

    for equation in program.eqns:
        name = equation.primitive.name
        if name in CALLS:
            called = next(iter(core.jaxprs_in_params(equation.params)))
            inner, results = _flatten(called, [known(var) for var in equation.invars])
            operations += inner
            values.update(zip(equation.outvars, results))
            continue
        operations.append(
            Operation(
                name,
                inputs=known_arrays(equation.invars),
                outputs=known_arrays(equation.outvars),
                carried=known_arrays(_carried(equation)),
                params=equation.params,
            )
        )
    return operations, [known(var) for var in program.outvars]


def _value(var) -> Value:
    dtype = getattr(var.aval, "dtype", None)
    return Value(getattr(var.aval, "shape", ()), getattr(dtype, "itemsize", 0))
