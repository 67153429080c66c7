"""Scenes of handwritten digits: the 1,797 images of 8 x 8 px that scikit-learn ships.

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI, CC BY 4.0). A
fifth of each digit's images is in scenes of the test split only.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm_jax.data.synthetic.builder import QA, SyntheticBuilder, pick

HELD_OUT_ONE_IN = 5
INK_LEVELS = 16  # of the images: 0 is paper
FEWEST_DIGITS = 3
MOST_ALIKE = 3  # of the digit whose number is asked for
SMALLEST_PX = 14
LARGER = 1.25  # a digit is said to be larger than another if its side is this many times as long
CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


def most_digits(image_px: int) -> int:
    return 4 + image_px // 32


@dataclass(frozen=True)
class Digit:
    value: int
    source: int  # which of scikit-learn's images
    cell: tuple[int, int]  # row and column of the grid that keeps digits apart
    left_px: int
    top_px: int
    side_px: int

    @property
    def right_px(self) -> int:
        return self.left_px + self.side_px


@dataclass(frozen=True)
class Scene:
    image_px: int
    background: tuple[int, int, int]
    ink: tuple[int, int, int]
    counted: (
        int  # the digit whose number is asked for; each number from 0 to MOST_ALIKE is as likely
    )
    digits: tuple[Digit, ...]

    @property
    def cells(self) -> int:
        """Rows, and columns, of the grid."""
        return math.ceil(math.sqrt(most_digits(self.image_px)))


class Digits(SyntheticBuilder):
    """Scenes of digits to count, to find, to compare and to add."""

    def example(self, rng, split):
        described = scene(rng, self.builder_config.image_px, split)
        return draw(described), questions(rng, described)


@functools.cache
def sources() -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Images (1797, 8, 8) uint8, and for every digit which of them are seen in training and which are held out."""
    from sklearn.datasets import load_digits  # takes a second to import: only for those who draw

    loaded = load_digits()
    of_digit = [np.flatnonzero(loaded.target == value) for value in range(10)]
    is_held_out = [
        np.arange(len(found)) % HELD_OUT_ONE_IN == HELD_OUT_ONE_IN - 1 for found in of_digit
    ]
    pairs = list(zip(of_digit, is_held_out, strict=True))
    images = np.round(loaded.images * (255 / INK_LEVELS)).astype(np.uint8)
    return (
        images,
        tuple(found[~out] for found, out in pairs),
        tuple(found[out] for found, out in pairs),
    )


def scene(rng: np.random.Generator, image_px: int, split: str) -> Scene:
    count, alike, counted = rng.integers(
        (FEWEST_DIGITS, 0, 0), (most_digits(image_px) + 1, MOST_ALIKE + 1, 10)
    )
    others = [value for value in range(10) if value != counted]
    values = [int(counted)] * alike + [pick(rng, others) for _ in range(count - alike)]
    background = tuple(int(channel) for channel in rng.integers(200, 256, 3))
    ink = tuple(int(channel) for channel in rng.integers(0, 100, 3))
    empty = Scene(image_px, background, ink, int(counted), ())
    free = rng.permutation(empty.cells**2)[:count]
    digits = (
        _placed(rng, empty, value, divmod(int(cell), empty.cells), split)
        for value, cell in zip(values, free)
    )
    return Scene(image_px, background, ink, int(counted), tuple(digits))


def _placed(rng, empty: Scene, value: int, cell: tuple[int, int], split: str) -> Digit:
    """A digit of random size somewhere in its cell, which keeps a pixel free on every side."""
    cell_px = empty.image_px // empty.cells
    side_px = int(rng.integers(SMALLEST_PX, cell_px - 1))
    top, left = (int(place * cell_px + rng.integers(1, cell_px - side_px)) for place in cell)
    return Digit(
        value, int(pick(rng, sources()[1 + (split == "test")][value])), cell, left, top, side_px
    )


def draw(described: Scene) -> Image.Image:
    image = Image.new("RGB", (described.image_px,) * 2, described.background)
    for digit in described.digits:
        mask = Image.fromarray(sources()[0][digit.source]).resize(
            (digit.side_px,) * 2, Image.Resampling.BICUBIC
        )
        image.paste(described.ink, (digit.left_px, digit.top_px), mask)
    return image


def questions(rng: np.random.Generator, described: Scene) -> list[QA]:
    """One of every type that the scene has an unambiguous answer to."""
    digits = described.digits
    counts = Counter(digit.value for digit in digits)
    counted = described.counted
    asked = [
        QA("how many digits are there?", str(len(digits)), "count"),
        QA(f"how many {counted}s are there?", str(counts[counted]), "count_value"),
        QA("what is the sum of all digits?", str(sum(digit.value for digit in digits)), "sum_all"),
        _more(rng, counts),
        *_corner(rng, described),
        *_beside(rng, described, counts),
        *_larger(rng, described, counts),
    ]
    return asked + _ends(described)


def _more(rng, counts) -> QA:
    pairs = [(a, b) for a in range(10) for b in range(10) if counts[a] != counts[b]]
    a, b = pick(rng, pairs)
    return QA(
        f"are there more {a}s than {b}s?",
        "yes" if counts[a] > counts[b] else "no",
        "compare_counts",
    )


def _corner(rng, described: Scene) -> list[QA]:
    last = described.cells - 1
    names = {(row * last, column * last): name for name, (row, column) in CORNERS.items()}
    found = [digit for digit in described.digits if digit.cell in names]
    if not found:
        return []
    digit = pick(rng, found)
    return [
        QA(f"which digit is in the {names[digit.cell]} corner?", str(digit.value), "locate_corner")
    ]


def _beside(rng, described: Scene, counts) -> list[QA]:
    """A digit that its neighbour in the row names."""
    at = {digit.cell: digit.value for digit in described.digits}
    found = [
        (value, side, at[row, column + step])
        for (row, column), value in at.items()
        for side, step in (("left", -1), ("right", 1))
        if counts[value] == 1 and (row, column + step) in at
    ]
    if not found:
        return []
    value, side, answer = pick(rng, found)
    return [QA(f"which digit is next to the {value}, on its {side}?", str(answer), "locate_beside")]


def _larger(rng, described: Scene, counts) -> list[QA]:
    once = [digit for digit in described.digits if counts[digit.value] == 1]
    pairs = [(a, b) for a in once for b in once if a.side_px >= LARGER * b.side_px]
    if not pairs:
        return []
    larger, smaller = pick(rng, pairs)
    said = [larger, smaller][:: pick(rng, (1, -1))]
    question = f"which is drawn larger, the {said[0].value} or the {said[1].value}?"
    return [QA(question, str(larger.value), "compare_sizes")]


def _ends(described: Scene) -> list[QA]:
    """About the leftmost and the rightmost digit, where it is plain which they are."""
    margin_px = described.image_px // 20
    first, second, *_ = sorted(described.digits, key=lambda digit: digit.left_px)
    *_, before, last = sorted(described.digits, key=lambda digit: digit.right_px)
    if (
        second.left_px - first.left_px < margin_px
        or last.right_px - before.right_px < margin_px
        or first == last
    ):
        return []
    total = str(first.value + last.value)
    asked = [QA("what is the sum of the leftmost and the rightmost digit?", total, "sum_ends")]
    if first.value != last.value:
        answer = "yes" if first.value > last.value else "no"
        asked.append(
            QA("is the leftmost digit greater than the rightmost?", answer, "compare_values")
        )
    return asked
