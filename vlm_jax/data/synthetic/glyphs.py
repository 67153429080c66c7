"""Pages of words (`pages.py`), and questions about the words and their positions."""

from collections import Counter

import numpy as np

from vlm_jax.data.synthetic.builder import QA, SyntheticBuilder, pick, with_transcript
from vlm_jax.data.synthetic.layout import random_page
from vlm_jax.data.synthetic.pages import Page, Word, draw, vocabulary

# Name -> index of the line, and of the word in the line.
CORNERS = {
    "top left": (0, 0),
    "top right": (0, -1),
    "bottom left": (-1, 0),
    "bottom right": (-1, -1),
}


class Glyphs(SyntheticBuilder):
    """Pages of words, and questions about the words and their positions."""

    def example(self, rng, split):
        config = self.builder_config
        page = random_page(rng, config.image_px, split, config.cell_px, config.fold)
        pairs = questions(rng, page, vocabulary(split, config.fold))
        if config.transcript:
            pairs = with_transcript(transcript(page), pairs)
        return draw(page), pairs


def transcript(page: Page) -> str:
    """Returns the words of a page with their colors, in the lines of the page."""
    lines = []
    for line in page.lines:
        lines.append(" ".join(f"{word.color} {word.text}" for word in line))
    return "\n".join(lines)


def questions(rng: np.random.Generator, page: Page, words: tuple[str, ...]) -> list[QA]:
    """Asks one question of every type that has an unambiguous answer; `words` may occur in them."""
    texts = [word.text for word in page.words]
    boxes_px = {word.text: word.box for word in page.words}
    number = rng.integers(len(texts))
    pairs = [
        QA("how many words are there?", str(len(texts)), "count"),
        QA("what does it say?", " ".join(texts), "read_all"),
        QA(f"what is word {number + 1}?", texts[number], "read_nth", boxes_px[texts[number]]),
        _present(rng, boxes_px, words),
    ]
    if len(texts) > 1:
        pairs.append(_first(rng, page.words))
    pairs += _by_color(rng, page)
    if len(texts) > 1:
        pairs += _by_size(page, "largest", max(word.size_px for word in page.words))
        pairs += _by_size(page, "smallest", min(word.size_px for word in page.words))
    return pairs + _in_corner(rng, page)


def _by_color(rng, page: Page) -> list[QA]:
    """Asks for a word that is the only one of its color."""
    counts = Counter(word.color for word in page.words)
    unique = [word for word in page.words if counts[word.color] == 1]
    if not unique:
        return []
    word: Word = pick(rng, unique)
    return [QA(f"what is the {word.color} word?", word.text, "read_color", word.box)]


def _by_size(page: Page, name: str, size_px: int) -> list[QA]:
    """Asks for the word of this size, if only one has it."""
    words = [word for word in page.words if word.size_px == size_px]
    if len(words) > 1:
        return []
    return [QA(f"what is the {name} word?", words[0].text, f"read_{name}", words[0].box)]


def _in_corner(rng, page: Page) -> list[QA]:
    """Asks for the word in a corner of a page of several lines; its line has several words."""
    corners = [name for name, (line, _) in CORNERS.items() if len(page.lines[line]) > 1]
    if not corners or len(page.lines) == 1:
        return []
    name = pick(rng, corners)
    line, position = CORNERS[name]
    word = page.lines[line][position]
    return [QA(f"what is the {name} word?", word.text, "read_corner", word.box)]


def _present(rng, boxes_px, words) -> QA:
    """Asks for a word of the page or for another one, each as often."""
    texts = list(boxes_px)
    is_present = bool(rng.integers(2))
    word = pick(rng, texts)
    while not is_present and word in texts:
        word = pick(rng, words)
    answer = "yes" if is_present else "no"
    return QA(f"is {word} there?", answer, "present", boxes_px.get(word))


def _first(rng, words) -> QA:
    """Asks which of two words comes first, in random order."""
    first, second = sorted(rng.choice(len(words), 2, replace=False))
    named = [words[first].text, words[second].text][:: pick(rng, (1, -1))]
    question = f"which comes first, {named[0]} or {named[1]}?"
    return QA(question, words[first].text, "first", words[first].box)
