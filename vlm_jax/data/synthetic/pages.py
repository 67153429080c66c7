"""Pages of words to read, drawn with the fonts that matplotlib ships.

The words are syllables without a meaning ("lat", "domir"), so that all are equally likely. A small
page has a few words. A larger one has more, in more sizes; the smallest is always `MIN_SIZE_PX`, so
an encoder with fewer pixels than the page may be unable to resolve it. A page may also be
typewritten: each letter in its cell, all of one size, which a small encoder learns to read in
minutes. The words and the font of the test split occur in no page of training or validation.

A fold decides which words and fonts those are. A choice made by looking at the test split of fold 0
leaves the test split of fold 1 untouched.
"""

import functools
import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

ONSETS, VOWELS, CODAS = "bdghjklmnprsvwz", "aeiou", "bdlmnrtv"
# Every 31st of the long words is used. 31 is prime to the numbers of letters, so that all letters
# occur at all positions.
STRIDE = 31
HELD_OUT_ONE_IN = 5

SEEN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
# By fold, of the test split.
HELD_OUT_FONTS = ("DejaVuSerif", "DejaVuSerif-Bold")
TYPEWRITTEN_FONTS = (
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
)
# By fold. In fold 0, bold and oblique are seen in training, but not together; in fold 1, bold is
# seen only where it is oblique.
HELD_OUT_TYPEWRITTEN_FONTS = ("DejaVuSansMono-BoldOblique", "DejaVuSansMono-Bold")
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

MIN_SIZE_PX = 10  # font size: an "x" is 5 px high, a "d" 8
SIZE_RATIO = 1.4  # of one font size to the next: enough to see which is larger
LINE_GAP_PX = 2
# Of typewritten letters, which then fill their cells.
FONT_SIZE_PER_CELL_WIDTH = 1.6
BASELINE_PER_CELL_HEIGHT = 0.75


@functools.cache
def words(fold: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns all words that are seen in training, and all that are held out in a fold."""
    short = map("".join, itertools.product(ONSETS, VOWELS, CODAS))
    long = map("".join, itertools.product(ONSETS, VOWELS, ONSETS, VOWELS, CODAS))
    all_words = [*short, *itertools.islice(long, 0, None, STRIDE)]
    held_out = [word for word in all_words if zlib.crc32(word.encode()) % HELD_OUT_ONE_IN == fold]
    return tuple(sorted(set(all_words) - set(held_out))), tuple(held_out)


def sizes_px(image_px: int) -> list[int]:
    """Returns the font sizes that a page has room for; an "x" is half as high."""
    largest = 8 + image_px // 8
    sizes = (MIN_SIZE_PX * SIZE_RATIO**step for step in itertools.count())
    return [int(size) for size in itertools.takewhile(lambda size: size <= largest, sizes)]


def max_words(image_px: int) -> int:
    """Returns the largest number of words on a page."""
    return 2 + image_px // 32


Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Word:
    """A word on a page."""

    text: str
    size_px: int
    color: str
    box: Box  # in pixels, around all of its ink


@dataclass(frozen=True)
class Page:
    """Words whose letters are placed by their font; lengths are in units of a pixel."""

    image_px: int
    font: str
    background: tuple[int, int, int]
    lines: tuple[tuple[Word, ...], ...] = ()  # from top to bottom, each from left to right

    unit_px = (1, 1)  # width and height of a unit
    line_gap = LINE_GAP_PX
    has_margin = True  # a line does not begin at the edge

    @property
    def words(self) -> tuple[Word, ...]:
        """In reading order."""
        return tuple(itertools.chain(*self.lines))

    @property
    def sizes_px(self) -> list[int]:
        """Font sizes of its words."""
        return sizes_px(self.image_px)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in units."""
        width_px, height_px = self.unit_px
        return self.image_px // width_px, self.image_px // height_px

    def ink(self, text: str, size_px: int) -> Box:
        """Returns the box of a word in units, relative to the start of its baseline."""
        return _ink(self.font, text, size_px)

    def gap(self, size_px: int) -> int:
        """Returns the units between a word and the one before it in its line."""
        return size_px // 2

    def write(self, pen: ImageDraw.ImageDraw, word: Word) -> None:
        """Draws a word."""
        ink_left, ink_top, _, _ = self.ink(word.text, word.size_px)
        left, top, _, _ = word.box
        start = (left - ink_left, top - ink_top)
        font = _font(self.font, word.size_px)
        pen.text(start, word.text, COLORS[word.color], font, anchor="ls")


@dataclass(frozen=True)
class Typewritten(Page):
    """A page with every letter in a cell of `cell_px` x 2 `cell_px`; a unit is a cell."""

    cell_px: int = 8

    line_gap = 0
    has_margin = False

    @property
    def unit_px(self) -> tuple[int, int]:
        return self.cell_px, 2 * self.cell_px

    @property
    def sizes_px(self) -> list[int]:
        return [int(self.cell_px * FONT_SIZE_PER_CELL_WIDTH)]

    def ink(self, text, size_px):
        return 0, 0, len(text), 1

    def gap(self, size_px):
        return 1

    def write(self, pen, word):
        width_px, height_px = self.unit_px
        left_px, top_px, _, _ = word.box
        baseline_px = top_px + int(height_px * BASELINE_PER_CELL_HEIGHT)
        font = _font(self.font, word.size_px)
        for i, letter in enumerate(word.text):
            middle_px = left_px + (i + 0.5) * width_px
            pen.text((middle_px, baseline_px), letter, COLORS[word.color], font, anchor="ms")


def vocabulary(split: str, fold: int = 0) -> tuple[str, ...]:
    """Returns the words that occur in pages and questions of a split."""
    seen, held_out = words(fold)
    return held_out if split == "test" else seen


def fonts(split: str, cell_px: int | None, fold: int = 0) -> tuple[str, ...]:
    """Returns the fonts of a split; `cell_px`: the cell width of typewritten pages."""
    is_typewritten = cell_px is not None
    held_out = (HELD_OUT_TYPEWRITTEN_FONTS if is_typewritten else HELD_OUT_FONTS)[fold]
    if split == "test":
        return (held_out,)
    seen = TYPEWRITTEN_FONTS if is_typewritten else SEEN_FONTS
    return tuple(font for font in seen if font != held_out)


@functools.cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # Every build of Pillow has the basic layout engine.
    return ImageFont.truetype(file, size_px, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(1 << 16)
def _ink(font: str, text: str, size_px: int) -> Box:
    """Returns the box of a word relative to the start of its baseline, with a pixel to spare."""
    left, top, right, bottom = _font(font, size_px).getbbox(text, anchor="ls")
    return int(left) - 1, int(top) - 1, int(right) + 1, int(bottom) + 1


def draw(page: Page) -> Image.Image:
    """Draws a page."""
    image = Image.new("RGB", (page.image_px, page.image_px), page.background)
    pen = ImageDraw.Draw(image)
    for word in page.words:
        page.write(pen, word)
    return image
