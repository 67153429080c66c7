"""Results as pictures."""

import warnings
from pathlib import Path

import matplotlib
import numpy as np

from vlm_jax.data.questions import Question

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (after the choice of a backend without a screen)

COLUMNS, ROWS = 6, 4
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_samples(path: Path, asked: list[Question], answers: list[str]) -> None:
    """A grid of images with question, answer and prediction; wrong ones in red and first, at most half of the grid."""
    chosen = _chosen(asked, answers)
    rows = -(-len(chosen) // COLUMNS)
    figure, cells = pyplot.subplots(rows, COLUMNS, figsize=(2.2 * COLUMNS, 2.7 * rows), squeeze=False)
    for cell in cells.flat:
        cell.axis("off")
    for cell, i in zip(cells.flat, chosen):
        question, given = asked[i], answers[i]
        right = given == question.answer
        for pixels in question.images()[:1]:
            cell.imshow(pixels, interpolation="nearest")
        verdict = given or "(nothing)" if right else f"{given or '(nothing)'}, not {question.answer}"
        title, color = f"{_wrapped(question.question)}\n{_printable(verdict)}", RIGHT if right else WRONG
        cell.set_title(title, fontsize=8, color=color, parse_math=False)  # a model may say anything, "$" too
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # what the font lacks is drawn as a box
        figure.tight_layout()
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _chosen(asked: list[Question], answers: list[str]) -> list[int]:
    """Indices spread evenly over the wrong answers and over the right ones."""
    right = [i for i, question in enumerate(asked) if question.answer == answers[i]]
    wrong = [i for i, question in enumerate(asked) if question.answer != answers[i]]
    half = COLUMNS * ROWS // 2
    return _spread(wrong, max(half, 2 * half - len(right))) + _spread(right, max(half, 2 * half - len(wrong)))


def _spread(items: list[int], count: int) -> list[int]:
    if len(items) <= count:
        return items
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count)]


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _wrapped(text: str, width: int = 26) -> str:
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width)
    return text[:cut] + "\n" + text[cut + 1 :] if cut > 0 else text
