"""Evaluation results as a picture."""

import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np

from vlm_jax.data.questions import Question

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (after the choice of a backend without a screen)

COLUMNS, ROWS = 6, 4
CELL_INCHES = (2.2, 2.7)
HEADING_INCHES = 0.6
LINE_CHARACTERS, MOST_LINES = 28, 4  # of a question or an answer
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_samples(path: Path, asked: list[Question], answers: list[str], split: str) -> None:
    """Draws a grid of images, each with a question and its answer: first wrong answers, in red, then right ones.

    At most half of the grid are wrong answers, unless there are too few right ones. The heading states the score on
    the split and how many answers of each kind are drawn.
    """
    is_right = [question.answer == answer for question, answer in zip(asked, answers, strict=True)]
    wrong, right = choose_samples(is_right)
    samples = wrong + right
    rows = -(-len(samples) // COLUMNS)
    size_inches = (COLUMNS * CELL_INCHES[0], rows * CELL_INCHES[1] + HEADING_INCHES)
    figure, cells = pyplot.subplots(
        rows, COLUMNS, figsize=size_inches, squeeze=False, layout="constrained"
    )
    figure.suptitle(heading(is_right, len(wrong), len(right), split), fontsize=11, parse_math=False)
    for cell in cells.flat:
        cell.axis("off")
    for cell, i in zip(cells.flat, samples):
        for pixels in asked[i].images()[:1]:
            cell.imshow(pixels, interpolation="nearest")
        title = f"{_wrapped(asked[i].question)}\n{verdict(asked[i].answer, answers[i])}"
        color = RIGHT if is_right[i] else WRONG
        cell.set_title(
            title, fontsize=8, color=color, parse_math=False
        )  # a model may write anything, "$" included
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # what the font lacks is drawn as a box
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def choose_samples(is_right: list[bool]) -> tuple[list[int], list[int]]:
    """Indices of wrong answers and of right ones, each evenly spaced over all of its kind."""
    right = [i for i, value in enumerate(is_right) if value]
    wrong = [i for i, value in enumerate(is_right) if not value]
    half = COLUMNS * ROWS // 2
    return _spread(wrong, max(half, 2 * half - len(right))), _spread(
        right, max(half, 2 * half - len(wrong))
    )


def _spread(items: list[int], count: int) -> list[int]:
    if len(items) <= count:
        return items
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count)]


def heading(is_right: list[bool], drawn_wrong: int, drawn_right: int, split: str) -> str:
    right = sum(is_right)
    wrong = len(is_right) - right
    errors = f"{drawn_wrong:,} of {wrong:,} errors (red)" if wrong else "no errors"
    return (
        f"{split}: exact match {right / len(is_right):.4f} on {len(is_right):,} questions\n"
        f"drawn here: {errors}, {drawn_right:,} of {right:,} right answers (green)"
    )


def verdict(reference: str, answer: str) -> str:
    """The answer where it is right, else "said ANSWER, is REFERENCE", wrapped."""
    if answer == reference:
        return _wrapped(answer) or "(nothing)"
    said, actual = (
        _wrapped(f"said {answer.strip() or 'nothing'}"),
        _wrapped(f"is {reference or 'nothing'}"),
    )
    fits = len(said) + len(actual) + 2 <= LINE_CHARACTERS
    return f"{said}, {actual}" if fits else f"{said},\n{actual}"


def _wrapped(text: str) -> str:
    """Text in lines; what is longer than `MOST_LINES` of them ends in an ellipsis."""
    printable = "".join(char if char.isprintable() or char.isspace() else "\ufffd" for char in text)
    return textwrap.fill(printable, LINE_CHARACTERS, max_lines=MOST_LINES, placeholder=" …")
