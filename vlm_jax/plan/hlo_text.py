"""A program's text (HLO) as computations of instructions."""

import math
import re
from dataclasses import dataclass

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
NAME = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True)
class Shape:
    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool  # False where the compiler keeps it in the chip's fast memory

    @property
    def bytes(self) -> int:
        return BYTES.get(self.dtype, 0) * math.prod(self.sizes)


@dataclass
class Instruction:
    name: str
    shapes: tuple[Shape, ...]  # of the result, the parts of a tuple one by one
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, as they are written
    is_root: bool = False

    @property
    def hbm_bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes if shape.in_hbm)


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Every computation by its name, and the name of the one that the program begins with."""
    computations, entry, body = {}, "", {}
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            body = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif " = " in line and line.startswith("  "):
            instruction = _instruction(line)
            body[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, value = line.strip().split(" = ", 1)
    kind, rest = _balanced(value) if value.startswith("(") else value.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    operands, rest = _balanced("(" + rest)
    shapes = tuple(
        Shape(
            dtype,
            tuple(map(int, filter(None, sizes.split(",")))),
            "S(" not in layout or "S(0)" in layout,
        )
        for dtype, sizes, layout in ARRAY.findall(kind)
    )
    name = name.removeprefix("ROOT ")
    found = tuple(NAME.findall(operands)) if opcode != "constant" else (operands[1:-1],)
    return Instruction(
        name.lstrip("%"), shapes, opcode, found or (operands[1:-1],), rest, "ROOT " in line[:8]
    )


def _balanced(text: str) -> tuple[str, str]:
    """Splits behind the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""
