"""Parses the text of a compiled program (HLO) into computations of instructions.

ENTRY %main (x: f32[4,8]) -> f32[4,4] {                             a computation
  %x = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)                      an instruction
  ROOT %dot.1 = f32[4,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}
}

ROOT    %dot.1 = f32[4,4] {1,0}   dot    (%x, %y), lhs_contracting_dims={1}
is_root name     shape    layout  opcode  operands attributes
"""

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
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"  \s*(?P<root>ROOT )?%?(?P<name>\S+) = (?P<value>.*)$")
ARRAY = re.compile(r"(?P<dtype>\w+)\[(?P<sizes>[\d,]*)\](?P<layout>\{[^}]*\})?")
NAME = re.compile(r"%([\w.-]+)")
CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?(?P<name>[\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{(?P<names>[^}]*)\}")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These call a function of two numbers, whose work is counted with the instruction.
APPLY_SCALARS = (
    *COLLECTIVES,
    "reduce",
    "reduce-window",
    "scatter",
    "sort",
    "select-and-scatter",
    "map",
)


@dataclass(frozen=True)
class Shape:
    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool  # False: the compiler keeps it in the chip's fast memory

    @property
    def bytes(self) -> int:
        return BYTES.get(self.dtype, 0) * math.prod(self.sizes)


@dataclass
class Instruction:
    name: str
    shapes: tuple[Shape, ...]  # of the result; a tuple has one per element
    opcode: str
    operands: tuple[str, ...]  # names; the literal of a constant, the number of a parameter
    attributes: str  # unparsed
    is_root: bool = False

    @property
    def hbm_bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes if shape.in_hbm)

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction enters."""
        if self.opcode in APPLY_SCALARS:
            return []
        names = CALLED.findall(self.attributes)
        for branches in BRANCHES.findall(self.attributes):
            names += NAME.findall(branches)
        return names


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns all computations by name, and the name of the entry computation."""
    computations, entry, body = {}, "", {}
    for line in text.splitlines():
        header, instruction = COMPUTATION.match(line), INSTRUCTION.match(line)
        if header:
            body = computations.setdefault(header["name"], {})
            if header["entry"]:
                entry = header["name"]
        elif instruction:
            body[instruction["name"]] = _parse_instruction(instruction)
    return computations, entry


def _parse_instruction(line: re.Match) -> Instruction:
    # A tuple's shape is in parentheses and contains spaces; an array's ends at the first space.
    value = line["value"]
    shape, rest = _split_parentheses(value) if value.startswith("(") else value.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    operands, attributes = _split_parentheses("(" + rest)
    operands = operands[1:-1]
    names = () if opcode == "constant" else tuple(NAME.findall(operands))
    return Instruction(
        name=line["name"],
        shapes=tuple(map(_parse_shape, ARRAY.finditer(shape))),
        opcode=opcode,
        operands=names or (operands,),
        attributes=attributes,
        is_root=line["root"] is not None,
    )


def _parse_shape(array: re.Match) -> Shape:
    sizes = tuple(int(size) for size in array["sizes"].split(",") if size)
    # S(n) is the memory space; 0, the default, is HBM.
    layout = array["layout"] or ""
    return Shape(array["dtype"], sizes, in_hbm="S(" not in layout or "S(0)" in layout)


def _split_parentheses(text: str) -> tuple[str, str]:
    """Splits a text after the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""
