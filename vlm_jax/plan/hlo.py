"""FLOPs, HBM traffic and collectives of a compiled program on one chip, from its text.

XLA's own `cost_analysis` counts the body of a loop once. Here a computation counts as often as it
is entered: the body of a `while` counts times the loop's trip count, which the loop's condition
compares with a constant.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from vlm_jax.plan import hlo_cost
from vlm_jax.plan.hlo_text import COLLECTIVES, Computation, Instruction, parse

INTEGERS = ("s32", "u32", "s64", "u64")
TRIP_COUNT = re.compile(r'known_trip_count"?[:=]\{"?n"?:"?(?P<count>\d+)')
CONDITION = re.compile(r"condition=%?(?P<name>[\w.-]+)")
BODY = re.compile(r"body=%?(?P<name>[\w.-]+)")
TUPLE_INDEX = re.compile(r"index=(?P<index>\d+)")
CHANNEL = re.compile(r"channel_id=(?P<id>\d+)")
OP_NAME = re.compile(r'op_name="(?P<name>[^"]*)"')
# The chips that take part in a collective: axes of a mesh, [groups, chips of one], or lists.
MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\]\s*\{(?P<axes>[^}]*)\}")
MESH_AXIS = re.compile(r"'(?P<name>\w+)'=(?P<size>\d+)")
AXIS_NAME = re.compile(r"'(?P<name>\w+)'")
IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(?P<chips>\d+)\]")
LISTED_GROUPS = re.compile(r"replica_groups=\{\{(?P<first>[\d,]+)\}")


@dataclass(frozen=True)
class Collective:
    kind: str
    bytes: int  # of its result on one chip
    chips: int  # that take part in one
    times: int  # per step
    source: str  # name of the operation in the model

    @property
    def sent_bytes(self) -> float:
        """Bytes that one chip sends, with a ring algorithm (Thakur et al. 2005, section 4).

        The TPU compiler implements a reduce-scatter as an all-reduce and a slice (libtpu 0.0.42,
        all kinds of slices).
        """
        others = (self.chips - 1) / self.chips
        factor = {
            "all-reduce": 2 * others,
            "reduce-scatter": self.chips - 1,
            "collective-permute": 1,
        }
        return self.bytes * factor.get(self.kind, others)


@dataclass
class Program:
    """Costs of one step on one chip."""

    flops: float = 0.0  # of matmuls and convolutions
    hbm_bytes: float = 0.0  # read and written
    collectives: list[Collective] = field(default_factory=list)


def analyze(text: str, chips: int, unknown_trip_count: int = 1) -> Program:
    """Returns the costs on one chip of a program that was compiled for `chips` chips.

    Args:
      unknown_trip_count: for loops whose end depends on the data.
    """
    computations, entry = parse(text)
    fused = _fused_computations(computations)
    program, occurrences = Program(), defaultdict(list)
    for name, times in execution_counts(computations, entry, unknown_trip_count).items():
        computation = computations[name]
        for instruction in computation.values():
            program.flops += times * hlo_cost.flops(instruction, computation)
            # A fusion's operands and results are counted with the instruction that calls it.
            if name not in fused:
                program.hbm_bytes += times * hlo_cost.hbm_bytes(
                    instruction, computation, computations
                )
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                collective = _collective(kind, instruction, chips, times)
                occurrences[_identity(instruction, collective)].append(collective)
    # A collective that overlaps with matmuls appears in every fusion it passes, even in those of a
    # loop that runs meanwhile. It runs as often as the least frequent of these.
    program.collectives = [min(same, key=_times) for same in occurrences.values()]
    return program


def _fused_computations(computations: dict[str, Computation]) -> set[str]:
    names = set()
    for computation in computations.values():
        for instruction in computation.values():
            if instruction.opcode == "fusion":
                names.update(instruction.called)
    return names


def execution_counts(
    computations: dict[str, Computation], entry: str, unknown_trip_count: int = 1
) -> dict[str, int]:
    """Number of executions of every computation in one run of the program."""
    counts: dict[str, int] = defaultdict(int)

    def enter(name: str, count: int):
        counts[name] += count
        for instruction in computations[name].values():
            trips = 1
            if instruction.opcode == "while":
                trips = _trip_count(instruction, computations) or unknown_trip_count
            for called in instruction.called:
                enter(called, count * trips)

    enter(entry, 1)
    return counts


def _trip_count(loop: Instruction, computations: dict[str, Computation]) -> int:
    """Iterations of a loop that counts from 0 to a constant; 0 if its end is not a constant.

    %condition:  compare(get-tuple-element(%state), index=0, constant(8))  the counter and its end
    %body:       ROOT tuple(add(%counter, constant(1)), ...)               the counter's increment
    """
    known = TRIP_COUNT.search(loop.attributes)
    if known:
        return int(known["count"])
    condition = computations[CONDITION.search(loop.attributes)["name"]]
    body = computations[BODY.search(loop.attributes)["name"]]
    ends = [
        _constant_value(i)
        for i in condition.values()
        if i.opcode == "constant" and i.shapes[0].dtype in INTEGERS
    ]
    counters = [i for i in condition.values() if i.opcode == "get-tuple-element"]
    if not ends or not counters:
        return 0
    index = int(TUPLE_INDEX.search(counters[0].attributes)["index"])
    root = next(i for i in body.values() if i.is_root)
    return max(ends) // (_increment(body.get(root.operands[index]), body) or 1)


def _increment(counter: Instruction | None, body: Computation) -> int:
    """Sum of the constants added to a counter per iteration.

    1, or 2 if the compiler unrolls two iterations into one.
    """
    if counter is None or counter.opcode not in ("add", "copy"):
        return 0
    inputs = [body[name] for name in counter.operands]
    return sum(
        _constant_value(i) if i.opcode == "constant" else _increment(i, body) for i in inputs
    )


def _constant_value(constant: Instruction) -> int:
    return int(constant.operands[0])


def _identity(instruction: Instruction, collective: Collective) -> tuple[str, ...]:
    """Identifies a collective by its channel, kind and source, else by its name.

    All its occurrences share them. Collectives of `shard_map` all have the same channel.
    """
    channel = CHANNEL.search(instruction.attributes)
    if channel is None:
        return (instruction.name,)
    return channel["id"], collective.kind, collective.source


def _times(collective: Collective) -> int:
    return collective.times


def _collective(kind: str, instruction: Instruction, chips: int, times: int) -> Collective:
    shapes = instruction.shapes
    # The result of a "-start" is a tuple of operands, results and, for a permute, contexts.
    if instruction.opcode == "all-gather-start":
        shapes = shapes[len(shapes) // 2 :]
    elif instruction.opcode == "collective-permute-start":
        shapes = shapes[1:2]
    source = OP_NAME.search(instruction.attributes)
    return Collective(
        kind,
        bytes=sum(shape.bytes for shape in shapes),
        chips=_group_size(instruction.attributes, chips),
        times=times,
        source=source["name"] if source else "",
    )


def _group_size(attributes: str, chips: int) -> int:
    """Number of chips in one group of a collective."""
    by_axes = MESH_GROUPS.search(attributes)
    if by_axes:
        sizes = dict(MESH_AXIS.findall(by_axes["mesh"]))
        return math.prod(int(sizes[name]) for name in AXIS_NAME.findall(by_axes["axes"]))
    by_shape = IOTA_GROUPS.search(attributes)
    if by_shape:
        return int(by_shape["chips"])
    listed = LISTED_GROUPS.search(attributes)
    if listed:
        return len(listed["first"].split(","))
    return 2 if "source_target_pairs" in attributes else chips
