"""Reads a compiled program's text: what runs how often, its FLOPs, bytes and collectives, on one chip.

XLA's own `cost_analysis` counts the body of a loop once. Here a computation counts as often as it is entered: bodies of
`while` times the loop's turns, which its condition compares with a constant.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from vlm_jax.plan.hlo_text import (
    NAME,
    Computation,
    Instruction,
    parse,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KERNELS = {
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
}  # products of queries and keys in each
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "iota",
}
FREE |= {
    "after-all",
    "copy-done",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "async-done",
}
FREE |= {"partition-id", "optimization-barrier"}
INTEGERS = ("s32", "u32", "s64", "u64")
CALLED = re.compile(
    r"(?:calls|body|condition|to_apply)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)


@dataclass(frozen=True)
class Collective:
    kind: str
    bytes: int  # of its result on one chip
    chips: int  # that take part in one
    times: int  # a step
    source: str  # the operation in the model that it serves

    @property
    def sent_bytes(self) -> float:
        """What a chip must send for one: a ring's share (Thakur et al. 2005, section 4).

        The TPU compiler makes an all-reduce and a cut of every reduce-scatter (libtpu 0.0.42, on all kinds of slices).
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
    flops: float = 0.0  # of products and convolutions
    hbm_bytes: float = 0.0  # read and written
    collectives: list[Collective] = field(default_factory=list)


def read(text: str, chips: int, unknown_turns: int = 1) -> Program:
    """What one chip does in a step of a compiled program over `chips` chips.

    A loop whose end depends on the data is counted as `unknown_turns`.
    """
    computations, entry = parse(text)
    program, found = Program(), {}
    fused = {
        name
        for body in computations.values()
        for i in body.values()
        if i.opcode == "fusion"
        for name in _called(i)
    }
    for name, times in execution_counts(computations, entry, unknown_turns).items():
        for instruction in computations[name].values():
            program.flops += times * _flops(instruction, computations[name])
            if name not in fused:
                program.hbm_bytes += times * _hbm_bytes(
                    instruction, computations[name], computations
                )
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                collective = _collective(kind, instruction, chips, times)
                found[_channel(instruction)] = min(
                    found.get(_channel(instruction), collective), collective, key=_times
                )
    program.collectives = list(found.values())
    return program


def _called(instruction: Instruction) -> list[str]:
    if instruction.opcode in (
        *COLLECTIVES,
        "reduce",
        "reduce-window",
        "scatter",
        "sort",
        "select-and-scatter",
        "map",
    ):
        return []  # what joins two numbers; its work is counted with the instruction
    found = CALLED.findall(instruction.rest)
    return [name for one, several in found for name in ([one] if one else NAME.findall(several))]


def execution_counts(
    computations: dict[str, Computation], entry: str, unknown_turns: int = 1
) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    times: dict[str, int] = defaultdict(int)

    def enter(name: str, count: int):
        times[name] += count
        for instruction in computations[name].values():
            turns = (
                _turns(instruction, computations) or unknown_turns
                if instruction.opcode == "while"
                else 1
            )
            for called in _called(instruction):
                enter(called, count * turns)

    enter(entry, 1)
    return times


def _turns(loop: Instruction, computations: dict[str, Computation]) -> int:
    """Turns of a loop that counts from 0 to a constant; 0 where its end is no constant."""
    known = re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition, body = (
        computations[re.search(rf"{name}=%?([\w.-]+)", loop.rest)[1]]
        for name in ("condition", "body")
    )
    ends = [
        _number(i)
        for i in condition.values()
        if i.opcode == "constant" and i.shapes[0].dtype in INTEGERS
    ]
    counters = [i for i in condition.values() if i.opcode == "get-tuple-element"]
    if not ends or not counters:
        return 0
    place = int(re.search(r"index=(\d+)", counters[0].rest)[1])
    root = next(i for i in body.values() if i.is_root)
    return max(ends) // (_step(body.get(root.operands[place]), body) or 1)


def _step(counter: Instruction | None, body: Computation) -> int:
    """What a turn adds to a counter: 1, or 2 where the compiler lays out two turns in one."""
    if counter is None or counter.opcode not in ("add", "copy"):
        return 0
    inputs = [body[name] for name in counter.operands]
    return sum(_number(i) if i.opcode == "constant" else _step(i, body) for i in inputs)


def _number(constant: Instruction) -> int:
    return int(constant.operands[0])


def _flops(instruction: Instruction, around: Computation) -> float:
    if instruction.opcode == "custom-call":
        return _kernel_flops(instruction, around)
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (around[name].shapes[0].sizes for name in instruction.operands[:2])
    out = instruction.shapes[0].sizes
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        return 2.0 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    return _convolution_flops(left, right, out, instruction.rest)


def _kernel_flops(instruction: Instruction, around: Computation) -> float:
    """Of attention (nn/kernels.py), whose products the compiler does not see; blocks that it leaves out included."""
    products = next(
        (count for name, count in KERNELS.items() if instruction.name.startswith(name)), 0
    )
    if not products:
        return 0.0
    inputs = (around[name].shapes[0] for name in instruction.operands)
    queries, keys = [x.sizes for x in inputs if len(x.sizes) == 3 and x.dtype in ("bf16", "f32")][
        :2
    ]
    return 2.0 * products * math.prod(queries) * keys[1]


def _convolution_flops(left, right, out, rest: str) -> float:
    """Products of a convolution, without those with padding: the TPU compiler writes batched products in this form."""
    of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    window = dict(
        re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", rest) or [""])[0])
    )
    spatial = sorted(letter for letter in of_out if letter.isdigit())
    count = 2.0 * right[of_right.index("i")] * out[of_out.index("b")] * out[of_out.index("f")]
    for i, letter in enumerate(spatial):
        setting = {name: value.split("x")[i] for name, value in window.items()}
        sizes = [
            shape[labels.index(letter)]
            for shape, labels in ((left, of_left), (right, of_right), (out, of_out))
        ]
        count *= _met(*sizes, setting)
    batch_groups = re.search(r"batch_group_count=(\d+)", rest)
    return count / (int(batch_groups[1]) if batch_groups else 1)


def _met(size: int, kernel: int, out: int, setting: dict[str, str]) -> int:
    """Pairs of output and kernel positions along one dimension that meet an input and not padding."""
    stride, spread, dilate = (
        int(setting.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(setting.get("pad", "0_0").split("_")[0])
    places = (o * stride + k * dilate - before for o in range(out) for k in range(kernel))
    return sum(0 <= place <= (size - 1) * spread and place % spread == 0 for place in places)


def _hbm_bytes(
    instruction: Instruction, around: Computation, computations: dict[str, Computation]
) -> float:
    """What an instruction reads and writes; of what is only sliced, the slice."""
    if instruction.opcode in FREE:
        return 0
    operands = [around[name] for name in instruction.operands if name in around]
    if instruction.opcode == "fusion":
        return _fusion_bytes(operands, computations[_called(instruction)[0]])
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * instruction.hbm_bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].hbm_bytes
    return instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands)


def _fusion_bytes(operands: list[Instruction], body: Computation) -> float:
    total = 0
    for inner in body.values():
        if inner.opcode == "parameter" and operands[int(inner.operands[0])].hbm_bytes:
            users = [user for user in body.values() if inner.name in user.operands]
            total += min(inner.hbm_bytes, sum(_touched(user, inner, body) for user in users))
    root = next(inner for inner in body.values() if inner.is_root)
    parts = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return total + sum(_written(part, body) for part in parts)


def _touched(user: Instruction, operand: Instruction, body: Computation) -> int:
    """Bytes of an operand that one of its users reads."""
    if user.operands[0] == operand.name and user.opcode in ("dynamic-slice", "slice", "gather"):
        return user.hbm_bytes
    if user.operands[0] == operand.name and user.opcode == "dynamic-update-slice":
        return 0
    return operand.hbm_bytes


def _written(part: Instruction, body: Computation) -> int:
    while part.opcode == "bitcast" and part.operands[0] in body:
        part = body[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return body[part.operands[1]].hbm_bytes
    return part.hbm_bytes


def _channel(instruction: Instruction) -> str:
    """What tells one collective from another.

    One that hides behind products is written in every fusion that it passes, also in those of a loop that turns while
    it is under way; it runs as often as where it is written the fewest times.
    """
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    return channel[1] if channel else instruction.name


def _times(collective: Collective) -> int:
    return collective.times


def _collective(kind: str, instruction: Instruction, chips: int, times: int) -> Collective:
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        shapes = (
            shapes[len(shapes) // 2 :] if kind == "all-gather" else shapes[1:2]
        )  # operands stand before results
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    size = sum(shape.bytes for shape in shapes)
    return Collective(
        kind, size, _group(instruction.rest, chips), times, source[1] if source else ""
    )


def _group(rest: str, chips: int) -> int:
    """Chips in one of the groups that exchange something."""
    by_axes = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if by_axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", by_axes[2]))
    by_shape = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if by_shape:
        return int(by_shape[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed[1].split(","))
    return 2 if "source_target_pairs" in rest else chips
