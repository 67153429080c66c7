"""Where every tensor of a public checkpoint goes: rows that are read in both directions.

A row names a stored tensor and the parameters that it becomes. The pattern is einops', from the stored axes to ours;
lengths come from the shapes of our parameters, but for those that are given:

    row("wte.weight", "decoder/embedding/table")
    row("h.0.attn.c_proj.weight", "decoder/blocks/layers/block_0/self/out/kernel", "(N H) D -> N H D", turn=0)
    row("patch_embedding.weight", "patch_embed/projection/kernel", "D c p q -> (p q c) D", p=16, q=16)

`turn` is the slice, along the axis of layers, of a parameter that the loop over depth stacks.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import einops
import numpy as np

from vlm_jax.nn.blocks import Sublayers, repeating_period

Shapes = Mapping[str, tuple[int, ...]]  # path of a parameter -> its shape


@dataclass(frozen=True)
class Part:
    """A parameter by its path, joined by /; `pattern` leads from the stored axes to its own (empty: as they are).

    `lengths` are those of letters that its shape does not tell.
    """

    ours: str
    pattern: str = ""
    turn: int | None = None
    lengths: tuple[tuple[str, int], ...] = ()

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        return shapes[self.ours] if self.turn is None else shapes[self.ours][1:]

    def stored_shape(self, shapes: Shapes) -> tuple[int, ...]:
        return _stored_shape(self.pattern, self.shape(shapes), self.lengths)

    def put(self, ours: np.ndarray) -> np.ndarray:
        """The parameter -> what is stored of it."""
        return (
            einops.rearrange(ours, _inverse(self.pattern), **dict(self.lengths))
            if self.pattern
            else ours
        )


@dataclass(frozen=True)
class Row:
    """A stored tensor whose parts lie one after another along `axis`, or woven into each other.

    `interleave` is a pattern with the axis `parts`, first on its right side: "(N parts H) D -> parts D N H".
    """

    hub: str
    parts: tuple[Part, ...]
    axis: int = 0
    interleave: str = ""

    def stored_shape(self, shapes: Shapes) -> tuple[int, ...]:
        if self.interleave:
            return _stored_shape(self.interleave, (len(self.parts), *self.parts[0].shape(shapes)))
        shapes = [part.stored_shape(shapes) for part in self.parts]
        if len(shapes) == 1:
            return shapes[0]
        joined = sum(shape[self.axis] for shape in shapes)
        return (*shapes[0][: self.axis], joined, *shapes[0][self.axis + 1 :])

    def take(self, stored: np.ndarray, part: Part, shapes: Shapes) -> np.ndarray:
        """The stored tensor -> one of its parts, a view where the layout allows it."""
        number = self.parts.index(part)
        if self.interleave:
            shape = (len(self.parts), *part.shape(shapes))
            return einops.rearrange(stored, self.interleave, **_lengths(self.interleave, shape))[
                number
            ]
        if len(self.parts) > 1:
            extents = [part.stored_shape(shapes)[self.axis] for part in self.parts]
            stored = np.split(stored, list(itertools.accumulate(extents))[:-1], axis=self.axis)[
                number
            ]
        if not part.pattern:
            return stored
        return einops.rearrange(
            stored, part.pattern, **_lengths(part.pattern, part.shape(shapes), part.lengths)
        )

    def put(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """All parts -> the stored tensor."""
        if self.interleave:
            return einops.rearrange(np.stack(ours), _inverse(self.interleave))
        cuts = [part.put(x) for part, x in zip(self.parts, ours)]
        return np.concatenate(cuts, axis=self.axis) if len(cuts) > 1 else cuts[0]


def row(hub: str, ours: str, pattern: str = "", turn: int | None = None, **lengths: int) -> Row:
    """A stored tensor that is one parameter."""
    return Row(hub, (Part(ours, pattern, turn, tuple(lengths.items())),))


def stored_axes(pattern: str) -> list[list[str]]:
    """The letters of every stored axis: 'D (N H) -> N H D' gives [['D'], ['N', 'H']]."""
    return _axes(pattern.split("->")[0])


def _axes(side: str) -> list[list[str]]:
    """'(N H) D' -> [['N', 'H'], ['D']]."""
    return [found.strip("()").split() for found in re.findall(r"\([^)]*\)|\S+", side)]


def _lengths(
    pattern: str, shape: tuple[int, ...], given: tuple[tuple[str, int], ...] = ()
) -> dict[str, int]:
    """The length of every letter on the right side of a pattern; one letter of an axis may be left to its length."""
    lengths = dict(given)
    for letters, n in zip(_axes(pattern.split("->")[1]), shape, strict=True):
        known = math.prod(lengths.get(letter, 1) for letter in letters)
        lengths |= {
            letter: n // known for letter in letters if letter not in lengths and letter != "1"
        }
    return lengths


def _stored_shape(
    pattern: str, shape: tuple[int, ...], given: tuple[tuple[str, int], ...] = ()
) -> tuple[int, ...]:
    if not pattern:
        return shape
    lengths = {"1": 1, **_lengths(pattern, shape, given)}
    return tuple(math.prod(lengths[letter] for letter in axis) for axis in stored_axes(pattern))


def _inverse(pattern: str) -> str:
    left, right = pattern.split("->")
    return f"{right} -> {left}"


def places(blocks: tuple[Sublayers, ...], sublayer: str) -> list[tuple[str, int]]:
    """Of every block that has the sublayer, in the order of depth: its path in the stack, and its turn of the loop."""
    length = len(repeating_period(blocks))
    return [
        (f"blocks/layers/block_{i % length}", i // length)
        for i, block in enumerate(blocks)
        if sublayer in block
    ]
