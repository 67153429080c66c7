"""Pages of words (`pages.py`), and questions about what stands where."""

from collections import Counter
from dataclasses import replace

import numpy as np

from vlm_jax.data.synthetic.builder import QA, SyntheticBuilder, pick
from vlm_jax.data.synthetic.pages import (
    Page,
    draw,
    page,
    pool,
)

CORNERS = {
    "top left": (0, 0),
    "top right": (0, -1),
    "bottom left": (-1, 0),
    "bottom right": (-1, -1),
}


class Glyphs(SyntheticBuilder):
    """Pages of words, and questions about what stands where."""

    def example(self, rng, split):
        config = self.builder_config
        described = page(rng, config.image_px, split, config.cell_px)
        asked = questions(rng, described, pool(split))
        if config.transcript:
            asked = [
                replace(each, question=f"{transcript(described)}\n{each.question}")
                for each in asked
            ]
        return draw(described), asked


def transcript(described: Page) -> str:
    """The words of a page with their colors, a line a line."""
    return "\n".join(
        " ".join(f"{word.color} {word.text}" for word in line) for line in described.lines
    )


def questions(rng: np.random.Generator, described: Page, vocabulary: tuple[str, ...]) -> list[QA]:
    """One of every type that the page has an unambiguous answer to; the words in them are of the vocabulary."""
    shown = described.words
    texts = [word.text for word in shown]
    number = rng.integers(len(shown))
    asked = [
        QA("how many words are there?", str(len(shown)), "count"),
        QA("what does it say?", " ".join(texts), "read_all"),
        QA(f"what is word {number + 1}?", texts[number], "read_nth"),
        _present(rng, texts, vocabulary),
    ]
    if len(shown) > 1:
        asked.append(_first(rng, texts))
    once = [word for word in shown if Counter(other.color for other in shown)[word.color] == 1]
    if once:
        word = pick(rng, once)
        asked.append(QA(f"what is the {word.color} word?", word.text, "read_color"))
    for said, extreme in (("largest", max), ("smallest", min)) if len(shown) > 1 else ():
        size_px = extreme(word.size_px for word in shown)
        of_size = [word.text for word in shown if word.size_px == size_px]
        if len(of_size) == 1:
            asked.append(QA(f"what is the {said} word?", of_size[0], f"read_{said}"))
    corners = [name for name, (line, _) in CORNERS.items() if len(described.lines[line]) > 1]
    if corners and len(described.lines) > 1:
        name = pick(rng, corners)
        line, place = CORNERS[name]
        asked.append(
            QA(f"what is the {name} word?", described.lines[line][place].text, "read_corner")
        )
    return asked


def _present(rng, texts, vocabulary) -> QA:
    there = bool(rng.integers(2))
    word = pick(rng, texts)
    while not there and word in texts:
        word = pick(rng, vocabulary)
    return QA(f"is {word} there?", "yes" if there else "no", "present")


def _first(rng, texts) -> QA:
    one, other = sorted(rng.choice(len(texts), 2, replace=False))
    said = [texts[one], texts[other]][:: pick(rng, (1, -1))]
    return QA(f"which comes first, {said[0]} or {said[1]}?", texts[one], "first")
