"""Weight tables: for every tensor of a Hugging Face checkpoint, the parameters that hold it.

A `Row` maps one tensor of the file to its target parameters and is read in both directions (load
and export). A pattern is einops' notation from the axes in the file to the axes of the parameter.
Axis lengths follow from the parameter's shape, except those passed as keywords:

    row("wte.weight", "decoder/embedding/table")
    row("h.0.mlp.c_fc.weight", "decoder/blocks/layers/block_0/mlp/up/kernel", layer=0)
    row("visual_projection.weight", "image_projection/kernel", "W D -> D W")
    row("patch.weight", "patch_embed/projection/kernel", "D c p q -> (p q c) D", p=16, q=16)

`layer` is the index along the leading layer axis of a parameter that `nn.scan` stacks. The
functions of the families take two prefixes: `hf`, of tensor names in the file, and `param`, of
parameter paths.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import einops
import numpy as np

from vlm_jax.nn.blocks import Sublayers, repeating_period

Shapes = Mapping[str, tuple[int, ...]]  # parameter path -> shape
AxisLengths = tuple[tuple[str, int], ...]  # letter of a pattern -> length


@dataclass(frozen=True)
class Target:
    """A parameter, or one layer of a stacked parameter, and its layout in the file.

    Attributes:
      param: path of the parameter, joined by "/".
      pattern: einops pattern from the axes in the file to the parameter's; empty: the same axes.
      layer: index along the layer axis of a stacked parameter; None: the parameter is not stacked.
      lengths: axis lengths that do not follow from the parameter's shape.
    """

    param: str
    pattern: str = ""
    layer: int | None = None
    lengths: AxisLengths = ()

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the parameter, or of one layer of it."""
        shape = shapes[self.param]
        return shape if self.layer is None else shape[1:]

    def stored_shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape in the file."""
        return _stored_shape(self.pattern, self.shape(shapes), self.lengths)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Converts a parameter to its layout in the file."""
        if not self.pattern:
            return array
        return einops.rearrange(array, _inverse(self.pattern), **dict(self.lengths))


@dataclass(frozen=True)
class Row:
    """A tensor of the file and its target parameters.

    Attributes:
      tensor: name in the file.
      targets: the parameters, concatenated along `axis` or interleaved.
      axis: axis of the concatenation, in the file.
      interleave: pattern of interleaved targets, with `parts` as the first axis on the right:
        "(N parts H) D -> parts D N H". Empty: the targets are concatenated.
    """

    tensor: str
    targets: tuple[Target, ...]
    axis: int = 0
    interleave: str = ""

    def stored_shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape in the file."""
        if self.interleave:
            stacked = (len(self.targets), *self.targets[0].shape(shapes))
            return _stored_shape(self.interleave, stacked)
        parts = [target.stored_shape(shapes) for target in self.targets]
        if len(parts) == 1:
            return parts[0]
        length = sum(shape[self.axis] for shape in parts)
        return (*parts[0][: self.axis], length, *parts[0][self.axis + 1 :])

    def stores_inputs_first(self, contracted: int) -> bool:
        """Returns whether a kernel's file has its inputs before its outputs, as Conv1D of GPT-2.

        Args:
          contracted: number of axes of the parameter that its product sums over.
        """
        pattern = self.interleave or self.targets[0].pattern
        if not pattern:
            return True
        # The first axis of interleaved targets counts them.
        first = 1 if self.interleave else 0
        inputs = sum(_axes(pattern.split("->")[1])[first : first + contracted], [])
        return set(stored_axes(pattern)[0]) <= set(inputs)

    def from_hf(self, tensor: np.ndarray, target: Target, shapes: Shapes) -> np.ndarray:
        """Extracts one target from a tensor of the file, as a view where the layout allows it."""
        index = self.targets.index(target)
        if self.interleave:
            stacked = (len(self.targets), *target.shape(shapes))
            lengths = _axis_lengths(self.interleave, stacked)
            return einops.rearrange(tensor, self.interleave, **lengths)[index]
        if len(self.targets) > 1:
            extents = [target.stored_shape(shapes)[self.axis] for target in self.targets]
            starts = list(itertools.accumulate(extents))[:-1]
            tensor = np.split(tensor, starts, axis=self.axis)[index]
        if not target.pattern:
            return tensor
        lengths = _axis_lengths(target.pattern, target.shape(shapes), target.lengths)
        return einops.rearrange(tensor, target.pattern, **lengths)

    def to_hf(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Builds the tensor of the file from all its targets."""
        if self.interleave:
            return einops.rearrange(np.stack(arrays), _inverse(self.interleave))
        tensors = [target.to_hf(array) for target, array in zip(self.targets, arrays)]
        return np.concatenate(tensors, axis=self.axis) if len(tensors) > 1 else tensors[0]


def row(
    tensor: str, param: str, pattern: str = "", layer: int | None = None, **lengths: int
) -> Row:
    """Maps a tensor of the file to a single parameter."""
    return Row(tensor, (Target(param, pattern, layer, tuple(lengths.items())),))


def stored_axes(pattern: str) -> list[list[str]]:
    """Letters of every axis in the file: 'D (N H) -> N H D' gives [['D'], ['N', 'H']]."""
    return _axes(pattern.split("->")[0])


def _axes(side: str) -> list[list[str]]:
    """'(N H) D' -> [['N', 'H'], ['D']]."""
    return [axis.strip("()").split() for axis in re.findall(r"\([^)]*\)|\S+", side)]


def _axis_lengths(
    pattern: str, shape: tuple[int, ...], lengths: AxisLengths = ()
) -> dict[str, int]:
    """Length of every letter on the right of a pattern; infers at most one letter of an axis."""
    by_letter = dict(lengths)
    for axis, n in zip(_axes(pattern.split("->")[1]), shape, strict=True):
        known = math.prod(by_letter.get(letter, 1) for letter in axis)
        for letter in axis:
            if letter not in by_letter and letter != "1":
                by_letter[letter] = n // known
    return by_letter


def _stored_shape(
    pattern: str, shape: tuple[int, ...], lengths: AxisLengths = ()
) -> tuple[int, ...]:
    if not pattern:
        return shape
    by_letter = {"1": 1, **_axis_lengths(pattern, shape, lengths)}
    stored = []
    for axis in stored_axes(pattern):
        stored.append(math.prod(by_letter[letter] for letter in axis))
    return tuple(stored)


def _inverse(pattern: str) -> str:
    left, right = pattern.split("->")
    return f"{right} -> {left}"


def layers_with(blocks: tuple[Sublayers, ...], sublayer: str) -> list[tuple[str, int]]:
    """(path, layer index) of every block that contains the sublayer, in depth order."""
    length = len(repeating_period(blocks))
    return [
        (f"blocks/layers/block_{i % length}", i // length)
        for i, block in enumerate(blocks)
        if sublayer in block
    ]
