"""Evaluation results as a picture."""

import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np

from vlm_jax.data.questions import Question
from vlm_jax.infer.metrics.answers import exact_match

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (after the choice of a backend without a display)

COLUMNS, ROWS = 6, 4
CELL_INCHES = (2.2, 2.7)
HEADING_INCHES = 0.6
DPI = 110
LINE_CHARACTERS, MAX_LINES = 28, 4  # of a question or an answer
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_samples(path: Path, examples: list[Question], answers: list[str], split: str) -> None:
    """Draws a grid of images, each with a question and its answer: wrong answers in red, then right
    ones.

    Wrong answers fill at most half of the grid, unless too few are right. The heading has the score
    on the split, and how many answers of each kind are drawn.
    """
    is_right = [
        exact_match(answer, question.references)
        for question, answer in zip(examples, answers, strict=True)
    ]
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
        for pixels in examples[i].images()[:1]:
            cell.imshow(pixels, interpolation="nearest")
        # A right answer is drawn alone.
        reference = answers[i] if is_right[i] else examples[i].answer
        title = f"{wrap(examples[i].question)}\n{verdict(reference, answers[i])}"
        color = RIGHT if is_right[i] else WRONG
        # parse_math=False, because a model may write anything, "$" included.
        cell.set_title(title, fontsize=8, color=color, parse_math=False)
    save_figure(figure, path)


def save_figure(figure: pyplot.Figure, path: Path) -> None:
    """Writes a figure with texts of a model, and closes it."""
    with warnings.catch_warnings():
        # Matplotlib draws a box for a character that the font lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def choose_samples(is_right: list[bool]) -> tuple[list[int], list[int]]:
    """Returns the indices of wrong and of right answers to draw, evenly spaced over each kind."""
    right = [i for i, value in enumerate(is_right) if value]
    wrong = [i for i, value in enumerate(is_right) if not value]
    half = COLUMNS * ROWS // 2
    drawn_wrong = _spread(wrong, max(half, 2 * half - len(right)))
    drawn_right = _spread(right, max(half, 2 * half - len(wrong)))
    return drawn_wrong, drawn_right


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
    """Returns the answer if it is right, else "said ANSWER, is REFERENCE", wrapped."""
    if exact_match(answer, [reference]):
        return wrap(answer) or "(nothing)"
    wrong = wrap(f"said {answer.strip() or 'nothing'}")
    right = wrap(f"is {reference or 'nothing'}")
    fits_one_line = len(wrong) + len(right) + 2 <= LINE_CHARACTERS
    return f"{wrong}, {right}" if fits_one_line else f"{wrong},\n{right}"


def wrap(text: str) -> str:
    """Breaks text into at most MAX_LINES lines; longer text ends in an ellipsis."""
    printable = "".join(char if char.isprintable() or char.isspace() else "\ufffd" for char in text)
    return textwrap.fill(printable, LINE_CHARACTERS, max_lines=MAX_LINES, placeholder=" …")
