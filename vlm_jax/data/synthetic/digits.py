"""Scenes of handwritten digits: the 1,797 images of 8 x 8 px that scikit-learn ships.

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998,
UCI, CC BY 4.0). A fifth of each digit's images occurs in scenes of the test split only.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm_jax.data.synthetic.builder import QA, SyntheticBuilder, pick, with_transcript

HELD_OUT_ONE_IN = 5
INK_LEVELS = 16  # of the images: 0 is paper
MIN_DIGITS = 3
MAX_COUNTED = 3  # digits of the value that is counted
MIN_SIDE_PX = 14
LARGER_RATIO = 1.25  # a digit is called larger if its side is at least this many times as long
CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
# Types of questions that a transcript answers: it has neither sizes nor pixels.
TRANSCRIBED = (
    *("count", "count_value", "sum_all", "compare_counts"),
    *("locate_corner", "locate_beside"),
)


def max_digits(image_px: int) -> int:
    """Returns the largest number of digits in an image."""
    return 4 + image_px // 32


@dataclass(frozen=True)
class Digit:
    """A digit in a scene."""

    value: int
    source: int  # index of scikit-learn's image
    cell: tuple[int, int]  # row and column of the grid that keeps digits apart
    left_px: int
    top_px: int
    side_px: int

    @property
    def right_px(self) -> int:
        return self.left_px + self.side_px

    @property
    def box_px(self) -> tuple[int, int, int, int]:
        return self.left_px, self.top_px, self.right_px, self.top_px + self.side_px


@dataclass(frozen=True)
class Scene:
    """Digits in the cells of a grid, at most one per cell."""

    image_px: int
    background: tuple[int, int, int]
    ink: tuple[int, int, int]
    #: the value whose digits are counted; every count from 0 to MAX_COUNTED is equally likely
    counted: int
    digits: tuple[Digit, ...]

    @property
    def cells(self) -> int:
        """Rows, and columns, of the grid."""
        return math.ceil(math.sqrt(max_digits(self.image_px)))


class Digits(SyntheticBuilder):
    """Scenes of digits to count, find, compare and add."""

    def example(self, rng, split):
        config = self.builder_config
        scene = random_scene(rng, config.image_px, split, config.fold)
        pairs = questions(rng, scene)
        if config.transcript:
            answered = [pair for pair in pairs if pair.type in TRANSCRIBED]
            pairs = with_transcript(transcript(scene), answered)
        return draw(scene), pairs


def transcript(scene: Scene) -> str:
    """Returns the digits in the rows of the grid, with a dot for an empty cell."""
    values = {digit.cell: str(digit.value) for digit in scene.digits}
    rows = []
    for row in range(scene.cells):
        rows.append(" ".join(values.get((row, column), ".") for column in range(scene.cells)))
    return "\n".join(rows)


@functools.cache
def sources(fold: int = 0) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Loads the images of digits.

    Returns:
      Images (1797, 8, 8) uint8, and for every value the indices of the images seen in training and
      of the held-out ones.
    """
    # Imported here because it takes a second, which only drawing needs.
    from sklearn.datasets import load_digits

    dataset = load_digits()
    seen, held_out = [], []
    for value in range(10):
        indices = np.flatnonzero(dataset.target == value)
        is_held_out = np.arange(len(indices)) % HELD_OUT_ONE_IN == HELD_OUT_ONE_IN - 1 - fold
        seen.append(indices[~is_held_out])
        held_out.append(indices[is_held_out])
    images = np.round(dataset.images * (255 / INK_LEVELS)).astype(np.uint8)
    return images, tuple(seen), tuple(held_out)


def random_scene(rng: np.random.Generator, image_px: int, split: str, fold: int = 0) -> Scene:
    """Draws the digits of a scene and their places."""
    count, counted_count, counted = rng.integers(
        (MIN_DIGITS, 0, 0), (max_digits(image_px) + 1, MAX_COUNTED + 1, 10)
    )
    others = [value for value in range(10) if value != counted]
    values = [int(counted)] * counted_count
    values += [pick(rng, others) for _ in range(count - counted_count)]
    background = tuple(int(channel) for channel in rng.integers(200, 256, 3))
    ink = tuple(int(channel) for channel in rng.integers(0, 100, 3))
    empty = Scene(image_px, background, ink, int(counted), ())
    _, seen, held_out = sources(fold)
    allowed = held_out if split == "test" else seen
    digits = []
    for value, cell in zip(values, rng.permutation(empty.cells**2)[:count]):
        place = divmod(int(cell), empty.cells)
        digits.append(_place(rng, empty, value, place, allowed[value]))
    return Scene(image_px, background, ink, int(counted), tuple(digits))


def _place(rng, scene: Scene, value: int, cell: tuple[int, int], images: np.ndarray) -> Digit:
    """Returns a digit of random size at a random place in its cell, one pixel off its borders.

    `images` are the indices of its possible images.
    """
    cell_px = scene.image_px // scene.cells
    side_px = int(rng.integers(MIN_SIDE_PX, cell_px - 1))
    row, column = cell
    top_px = int(row * cell_px + rng.integers(1, cell_px - side_px))
    left_px = int(column * cell_px + rng.integers(1, cell_px - side_px))
    return Digit(value, int(pick(rng, images)), cell, left_px, top_px, side_px)


def draw(scene: Scene) -> Image.Image:
    """Draws a scene."""
    image = Image.new("RGB", (scene.image_px, scene.image_px), scene.background)
    images, _, _ = sources()
    for digit in scene.digits:
        size = (digit.side_px, digit.side_px)
        mask = Image.fromarray(images[digit.source]).resize(size, Image.Resampling.BICUBIC)
        image.paste(scene.ink, (digit.left_px, digit.top_px), mask)
    return image


def questions(rng: np.random.Generator, scene: Scene) -> list[QA]:
    """Asks one question of every type that has an unambiguous answer in the scene."""
    digits, counted = scene.digits, scene.counted
    counts = Counter(digit.value for digit in digits)
    return [
        QA("how many digits are there?", str(len(digits)), "count"),
        QA(f"how many {counted}s are there?", str(counts[counted]), "count_value"),
        QA("what is the sum of all digits?", str(sum(digit.value for digit in digits)), "sum_all"),
        _compare_counts(rng, counts),
        *_locate_corner(rng, scene),
        *_locate_beside(rng, scene, counts),
        *_compare_sizes(rng, scene, counts),
        *_compare_ends(scene),
    ]


def _compare_counts(rng, counts) -> QA:
    pairs = [(a, b) for a in range(10) for b in range(10) if counts[a] != counts[b]]
    a, b = pick(rng, pairs)
    answer = "yes" if counts[a] > counts[b] else "no"
    return QA(f"are there more {a}s than {b}s?", answer, "compare_counts")


def _locate_corner(rng, scene: Scene) -> list[QA]:
    last = scene.cells - 1
    names = {(row * last, column * last): name for name, (row, column) in CORNERS.items()}
    digits = [digit for digit in scene.digits if digit.cell in names]
    if not digits:
        return []
    digit = pick(rng, digits)
    question = f"which digit is in the {names[digit.cell]} corner?"
    return [QA(question, str(digit.value), "locate_corner", digit.box_px)]


def _locate_beside(rng, scene: Scene, counts) -> list[QA]:
    """Asks for the neighbor in the row of a digit whose value occurs once."""
    by_cell = {digit.cell: digit for digit in scene.digits}
    candidates = []
    for (row, column), digit in by_cell.items():
        for side, step in (("left", -1), ("right", 1)):
            neighbor = (row, column + step)
            if counts[digit.value] == 1 and neighbor in by_cell:
                candidates.append((digit.value, side, by_cell[neighbor]))
    if not candidates:
        return []
    value, side, answer = pick(rng, candidates)
    question = f"which digit is next to the {value}, on its {side}?"
    return [QA(question, str(answer.value), "locate_beside", answer.box_px)]


def _compare_sizes(rng, scene: Scene, counts) -> list[QA]:
    unique = [digit for digit in scene.digits if counts[digit.value] == 1]
    pairs = [(a, b) for a in unique for b in unique if a.side_px >= LARGER_RATIO * b.side_px]
    if not pairs:
        return []
    larger, smaller = pick(rng, pairs)
    named = [larger, smaller][:: pick(rng, (1, -1))]
    question = f"which is drawn larger, the {named[0].value} or the {named[1].value}?"
    return [QA(question, str(larger.value), "compare_sizes", larger.box_px)]


def _compare_ends(scene: Scene) -> list[QA]:
    """Asks about the leftmost and the rightmost digit, if both are clearly outermost."""
    margin_px = scene.image_px // 20
    first, second, *_ = sorted(scene.digits, key=lambda digit: digit.left_px)
    *_, before_last, last = sorted(scene.digits, key=lambda digit: digit.right_px)
    is_leftmost_clear = second.left_px - first.left_px >= margin_px
    is_rightmost_clear = last.right_px - before_last.right_px >= margin_px
    if first == last or not is_leftmost_clear or not is_rightmost_clear:
        return []
    total = str(first.value + last.value)
    pairs = [QA("what is the sum of the leftmost and the rightmost digit?", total, "sum_ends")]
    if first.value != last.value:
        question = "is the leftmost digit greater than the rightmost?"
        answer = "yes" if first.value > last.value else "no"
        pairs.append(QA(question, answer, "compare_values"))
    return pairs
