"""Places random words on a page."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vlm_jax.data.synthetic.builder import pick
from vlm_jax.data.synthetic.pages import (
    COLORS,
    Page,
    Typewritten,
    Word,
    fonts,
    max_words,
    vocabulary,
)

TRIES = 8  # layouts with one largest size, before it is given up


def random_page(
    rng: np.random.Generator,
    image_px: int,
    split: str,
    cell_px: int | None = None,
    fold: int = 0,
) -> Page:
    """Draws the words of a page and their places.

    Drops the largest font sizes until the words fit.
    """
    count = rng.integers(1, max_words(image_px) + 1)
    font = pick(rng, fonts(split, cell_px, fold))
    background = tuple(int(channel) for channel in rng.integers(225, 256, 3))
    all_words, all_colors = vocabulary(split, fold), list(COLORS)
    texts = [all_words[i] for i in rng.choice(len(all_words), count, replace=False)]
    reuses_colors = count > len(all_colors)
    colors = [all_colors[i] for i in rng.choice(len(all_colors), count, replace=reuses_colors)]
    if cell_px is None:
        page = Page(image_px, font, background)
    else:
        page = Typewritten(image_px, font, background, cell_px=cell_px)
    for attempt in itertools.count():
        allowed_px = page.sizes_px[: max(1, len(page.sizes_px) - attempt // TRIES)]
        items = []
        for text, color in zip(texts, colors, strict=True):
            items.append(Item(text, pick(rng, allowed_px), color))
        lines = _layout(rng, page, items)
        if lines:
            return replace(page, lines=lines)


class Item(NamedTuple):
    """A word without a place."""

    text: str
    size_px: int
    color: str


def _layout(rng, page: Page, items: list[Item]) -> tuple[tuple[Word, ...], ...] | None:
    """Returns lines of words with random space between them, or None if they do not fit."""
    lines = _break_lines(rng, page, items)
    ascents, descents = [], []  # above and below the baseline of each line, in units
    for line in lines:
        inks = [page.ink(item.text, item.size_px) for item in line]
        ascents.append(max(abs(top) for _, top, _, _ in inks))
        descents.append(max(abs(bottom) for _, _, _, bottom in inks))
    heights = [ascent + descent for ascent, descent in zip(ascents, descents)]
    tops = _spread(rng, page.size[1], heights, [page.line_gap] * len(lines))
    if tops is None:
        return None
    words_by_line = []
    for line, top, ascent in zip(lines, tops, ascents):
        words_by_line.append(_place_line(rng, page, line, top + ascent))
    return None if None in words_by_line else tuple(words_by_line)


def _break_lines(rng, page: Page, items: list[Item]) -> list[list[Item]]:
    """Breaks items into lines that are full or end by chance."""
    lines, used = [], 0
    for item in items:
        left, _, right, _ = page.ink(item.text, item.size_px)
        needed = right - left + page.gap(item.size_px)
        if not lines or used + needed > page.size[0] or rng.random() < 1 / 3:
            lines.append([])
            used = 0
        lines[-1].append(item)
        used += needed
    return lines


def _place_line(rng, page: Page, items: list[Item], baseline: int) -> tuple[Word, ...] | None:
    """Returns the words of a line with random space between them, or None if they do not fit."""
    inks = [page.ink(item.text, item.size_px) for item in items]
    widths = [right - left for left, _, right, _ in inks]
    gaps = [page.gap(item.size_px) for item in items]
    if not page.has_margin:
        gaps[0] = 0
    starts = _spread(rng, page.size[0], widths, gaps)
    if starts is None:
        return None
    line = []
    for item, start, width, (_, top, _, bottom) in zip(items, starts, widths, inks):
        box = (start, baseline + top, start + width, baseline + bottom)
        box_px = tuple(np.multiply(box, page.unit_px * 2).tolist())
        line.append(Word(item.text, item.size_px, item.color, box_px))
    return tuple(line)


def _spread(rng, size: int, lengths: list[int], gaps: list[int]) -> list[int] | None:
    """Places lengths in order, each after at least its gap, with the rest of `size` at random.

    Returns:
      The start of each length, or None if they do not fit.
    """
    slack = size - sum(lengths) - sum(gaps)
    if slack < 0:
        return None
    before = np.sort(rng.integers(0, slack + 1, len(lengths)))
    ends = np.cumsum(np.add(lengths, gaps))
    return [int(start) for start in before + ends - lengths - gaps[0] // 2]
