"""Pages of words to be read, drawn with the fonts that matplotlib ships.

The words are syllables that mean nothing ("lat", "domir"), so that each is as likely as any other. A small page holds a
few words; a larger one more of them and in more sizes, the smallest always `SMALLEST_PX`: what an encoder with fewer
pixels than the page cannot resolve it cannot read. Or the page is typewritten: every letter in a cell of its own, all
of one size, which a small encoder learns to read in minutes. The words and the font of the test split are in no page
of training or validation.
"""

import functools
import itertools
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_jax.data.synthetic.builder import pick

ONSETS, VOWELS, CODAS = "bdghjklmnprsvwz", "aeiou", "bdlmnrtv"
STRIDE = 31  # every 31st of the long words: prime to the numbers of letters, so all letters come in all places
HELD_OUT_ONE_IN = 5

SEEN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
HELD_OUT_FONTS = ("DejaVuSerif",)
TYPEWRITTEN_FONTS = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique")
HELD_OUT_TYPEWRITTEN_FONTS = (
    "DejaVuSansMono-BoldOblique",
)  # of which bold and oblique are seen, each alone
COLORS = {
    "black": (0, 0, 0),
    "red": (215, 0, 20),
    "blue": (20, 50, 225),
    "green": (0, 130, 30),
    "purple": (140, 20, 170),
    "orange": (225, 105, 0),
    "brown": (115, 65, 25),
    "teal": (0, 130, 140),
}

SMALLEST_PX = 10  # of a font: an "x" is 5 px high, a "d" 8
SIZE_STEP = 1.4  # from one size of letters to the next: enough to see which is larger
LINE_GAP_PX = 2
LETTER_OF_CELL = (
    1.6  # font size of typewritten letters over the width of their cells, which they then fill
)
BASELINE_OF_CELL = 0.75  # where they stand, over the height of the cells
TRIES = 8  # layouts with one largest size, before it is given up


@functools.cache
def words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All words that are seen in training, and all that are held out."""
    short = map("".join, itertools.product(ONSETS, VOWELS, CODAS))
    long = map("".join, itertools.product(ONSETS, VOWELS, ONSETS, VOWELS, CODAS))
    every = [*short, *itertools.islice(long, 0, None, STRIDE)]
    held_out = [word for word in every if zlib.crc32(word.encode()) % HELD_OUT_ONE_IN == 0]
    return tuple(sorted(set(every) - set(held_out))), tuple(held_out)


def sizes_px(image_px: int) -> list[int]:
    """Font sizes, from the smallest to those that a page of so many pixels has room for; an "x" is half as high."""
    largest = 8 + image_px // 8
    sizes = (SMALLEST_PX * SIZE_STEP**step for step in itertools.count())
    return [int(size) for size in itertools.takewhile(lambda size: size <= largest, sizes)]


def most_words(image_px: int) -> int:
    return 2 + image_px // 32


@dataclass(frozen=True)
class Word:
    text: str
    size_px: int
    color: str
    box: tuple[int, int, int, int]  # left, top, right, bottom, in pixels; all of its ink is inside


@dataclass(frozen=True)
class Page:
    """Words whose letters stand where their font puts them; they are set in units of a pixel."""

    image_px: int
    font: str
    background: tuple[int, int, int]
    lines: tuple[tuple[Word, ...], ...] = ()  # from top to bottom, each from left to right

    unit_px = (1, 1)  # width and height of a unit
    line_gap = LINE_GAP_PX
    has_margin = True  # whether a line keeps off the edge

    @property
    def words(self) -> tuple[Word, ...]:
        """In reading order."""
        return tuple(itertools.chain(*self.lines))

    @property
    def sizes_px(self) -> list[int]:
        """Font sizes that its words may have."""
        return sizes_px(self.image_px)

    @property
    def room(self) -> tuple[int, int]:
        """Width and height in units."""
        width_px, height_px = self.unit_px
        return self.image_px // width_px, self.image_px // height_px

    def ink(self, text: str, size_px: int) -> tuple[int, int, int, int]:
        """The box of a word, in units, around the point where its line begins."""
        return _ink(self.font, text, size_px)

    def gap(self, size_px: int) -> int:
        """Units that a word keeps from the one before it in its line."""
        return size_px // 2

    def write(self, pen: ImageDraw.ImageDraw, word: Word) -> None:
        ink, (left, top, *_) = self.ink(word.text, word.size_px), word.box
        at, font = (left - ink[0], top - ink[1]), _font(self.font, word.size_px)
        pen.text(at, word.text, COLORS[word.color], font, anchor="ls")


@dataclass(frozen=True)
class Typewritten(Page):
    """Every letter in a cell of `cell_px` x 2 `cell_px`, all of one size; a cell is a unit."""

    cell_px: int = 8

    line_gap = 0
    has_margin = False

    @property
    def unit_px(self) -> tuple[int, int]:
        return self.cell_px, 2 * self.cell_px

    @property
    def sizes_px(self) -> list[int]:
        return [int(self.cell_px * LETTER_OF_CELL)]

    def ink(self, text, size_px):
        return 0, 0, len(text), 1

    def gap(self, size_px):
        return 1

    def write(self, pen, word):
        width_px, height_px = self.unit_px
        baseline_px = word.box[1] + int(height_px * BASELINE_OF_CELL)
        for i, letter in enumerate(word.text):
            at, font = (
                (word.box[0] + (i + 0.5) * width_px, baseline_px),
                _font(self.font, word.size_px),
            )
            pen.text(at, letter, COLORS[word.color], font, anchor="ms")


def pool(split: str) -> tuple[str, ...]:
    """The words that a split's pages and questions are made of."""
    return words()[split == "test"]


def fonts(split: str, cell_px: int) -> tuple[str, ...]:
    seen, held_out = (
        (TYPEWRITTEN_FONTS, HELD_OUT_TYPEWRITTEN_FONTS) if cell_px else (SEEN_FONTS, HELD_OUT_FONTS)
    )
    return held_out if split == "test" else seen


def page(rng: np.random.Generator, image_px: int, split: str, cell_px: int = 0) -> Page:
    """A random page; the largest sizes are given up where its words do not fit."""
    count = rng.integers(1, most_words(image_px) + 1)
    font = pick(rng, fonts(split, cell_px))
    background = tuple(int(channel) for channel in rng.integers(225, 256, 3))
    texts = [pool(split)[i] for i in rng.choice(len(pool(split)), count, replace=False)]
    colors = [list(COLORS)[i] for i in rng.choice(len(COLORS), count, replace=count > len(COLORS))]
    empty = (
        Typewritten(image_px, font, background, cell_px=cell_px)
        if cell_px
        else Page(image_px, font, background)
    )
    sizes = empty.sizes_px
    for tried in itertools.count():
        allowed = sizes[: max(1, len(sizes) - tried // TRIES)]
        chosen = [pick(rng, allowed) for _ in texts]
        lines = _layout(rng, empty, list(zip(texts, chosen, colors, strict=True)))
        if lines:
            return replace(empty, lines=lines)


def _layout(rng, empty: Page, items):
    """Lines of words with random space between them, or None where they do not fit."""
    lines = _broken(rng, empty, items)
    ups, downs = (
        [max(abs(empty.ink(text, size)[side]) for text, size, _ in line) for line in lines]
        for side in (1, 3)
    )
    tops = _spread(
        rng, empty.room[1], list(map(sum, zip(ups, downs))), [empty.line_gap] * len(lines)
    )
    if tops is None:
        return None
    placed = [_line(rng, empty, line, top + up) for line, top, up in zip(lines, tops, ups)]
    return None if None in placed else tuple(placed)


def _broken(rng, empty: Page, items):
    """The items in lines that are full, or that end by chance."""
    lines, used = [], 0
    for text, size_px, color in items:
        left, _, right, _ = empty.ink(text, size_px)
        needed = right - left + empty.gap(size_px)
        if not lines or used + needed > empty.room[0] or rng.random() < 1 / 3:
            lines.append([])
            used = 0
        lines[-1].append((text, size_px, color))
        used += needed
    return lines


def _line(rng, empty: Page, items, start_y) -> tuple[Word, ...] | None:
    inks = [empty.ink(text, size_px) for text, size_px, _ in items]
    gaps = [empty.gap(size_px) for _, size_px, _ in items]
    gaps[0] *= empty.has_margin
    lefts = _spread(rng, empty.room[0], [ink[2] - ink[0] for ink in inks], gaps)
    if lefts is None:
        return None
    starts = [left - ink[0] for left, ink in zip(lefts, inks)]
    boxes = [(x + i[0], start_y + i[1], x + i[2], start_y + i[3]) for x, i in zip(starts, inks)]
    return tuple(
        Word(*item, tuple(np.multiply(box, empty.unit_px * 2).tolist()))
        for item, box in zip(items, boxes)
    )


def _spread(rng, room: int, lengths: list[int], gaps: list[int]) -> list[int] | None:
    """Where each of the lengths begins: in order, each after at least its gap, the rest of the room at random."""
    slack = room - sum(lengths) - sum(gaps)
    if slack < 0:
        return None
    before = np.sort(rng.integers(0, slack + 1, len(lengths)))
    ends = np.cumsum(np.add(lengths, gaps))
    return [int(start) for start in before + ends - lengths - gaps[0] // 2]


@functools.cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(
        file, size_px, layout_engine=ImageFont.Layout.BASIC
    )  # there in every build of Pillow


@functools.lru_cache(1 << 16)
def _ink(font: str, text: str, size_px: int) -> tuple[int, int, int, int]:
    """The box of a word around the point where its baseline begins, with a pixel to spare on every side."""
    left, top, right, bottom = _font(font, size_px).getbbox(text, anchor="ls")
    return int(left) - 1, int(top) - 1, int(right) + 1, int(bottom) + 1


def draw(described: Page) -> Image.Image:
    image = Image.new("RGB", (described.image_px,) * 2, described.background)
    pen = ImageDraw.Draw(image)
    for word in described.words:
        described.write(pen, word)
    return image
