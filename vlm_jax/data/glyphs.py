"""Pages of words to be read, drawn with the fonts that matplotlib ships.

The words are syllables that mean nothing ("lat", "domir"), so that a word that was never seen can be read only letter
by letter. A small page holds a few words; a larger one more of them and in more sizes, the smallest always
`SMALLEST_PX`: what an encoder with fewer pixels than the page cannot resolve it cannot read. The words and the font of
the test split are in no page of training or validation.
"""

import functools
import itertools
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_jax.data.drawn import Asked, Drawn, pick

ONSETS, VOWELS, CODAS = "bdghjklmnprsvwz", "aeiou", "bdlmnrtv"
STRIDE = 31  # every 31st of the long words: prime to the numbers of letters, so all letters come in all places
HELD_OUT_ONE_IN = 5

SEEN_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold")
HELD_OUT_FONTS = ("DejaVuSerif",)
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
CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}

SMALLEST_PX = 10
SIZE_STEP = 1.4  # from one size of letters to the next: enough to see which is larger
FEWEST_WORDS = 2
LINE_GAP_PX = 2
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
    """Heights of letters, from the smallest to those that a page of this size has room for."""
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
    image_px: int
    font: str
    background: tuple[int, int, int]
    lines: tuple[tuple[Word, ...], ...]  # from top to bottom, each from left to right

    @property
    def words(self) -> tuple[Word, ...]:
        """In reading order."""
        return tuple(itertools.chain(*self.lines))


class Glyphs(Drawn):
    """Pages of words, and questions about what stands where."""

    def example(self, rng, split):
        described = page(rng, self.builder_config.image_px, split)
        return draw(described), questions(rng, described, pool(split))


def pool(split: str) -> tuple[str, ...]:
    """The words that a split's pages and questions are made of."""
    return words()[split == "test"]


def page(rng: np.random.Generator, image_px: int, split: str) -> Page:
    """A random page; the largest sizes are given up where its words do not fit."""
    count = rng.integers(FEWEST_WORDS, most_words(image_px) + 1)
    font = pick(rng, HELD_OUT_FONTS if split == "test" else SEEN_FONTS)
    background = tuple(int(channel) for channel in rng.integers(225, 256, 3))
    texts = [pool(split)[i] for i in rng.choice(len(pool(split)), count, replace=False)]
    colors = [list(COLORS)[i] for i in rng.choice(len(COLORS), count, replace=count > len(COLORS))]
    sizes = sizes_px(image_px)
    for tried in itertools.count():
        allowed = sizes[: max(1, len(sizes) - tried // TRIES)]
        chosen = [pick(rng, allowed) for _ in texts]
        lines = _layout(rng, image_px, font, list(zip(texts, chosen, colors, strict=True)))
        if lines:
            return Page(image_px, font, background, lines)


def _layout(rng, image_px, font, items):
    """Lines of words with random space between them, or None where they do not fit."""
    lines = _broken(rng, image_px, font, items)
    ups, downs = (
        [max(abs(_ink(font, text, size_px)[side]) for text, size_px, _ in line) for line in lines] for side in (1, 3)
    )
    tops = _spread(rng, image_px, list(map(sum, zip(ups, downs))), [LINE_GAP_PX] * len(lines))
    if tops is None:
        return None
    placed = [_line(rng, image_px, font, line, top + up) for line, top, up in zip(lines, tops, ups)]
    return None if None in placed else tuple(placed)


def _broken(rng, image_px, font, items):
    """The items in lines that are full, or that end by chance."""
    lines, used_px = [], 0
    for text, size_px, color in items:
        left, _, right, _ = _ink(font, text, size_px)
        needed_px = right - left + size_px // 2
        if not lines or used_px + needed_px > image_px or rng.random() < 1 / 3:
            lines.append([])
            used_px = 0
        lines[-1].append((text, size_px, color))
        used_px += needed_px
    return lines


def _line(rng, image_px, font, items, baseline_px) -> tuple[Word, ...] | None:
    inks = [_ink(font, text, size_px) for text, size_px, _ in items]
    lefts = _spread(rng, image_px, [ink[2] - ink[0] for ink in inks], [size_px // 2 for _, size_px, _ in items])
    if lefts is None:
        return None
    starts = [left - ink[0] for left, ink in zip(lefts, inks)]
    boxes = [(x + i[0], baseline_px + i[1], x + i[2], baseline_px + i[3]) for x, i in zip(starts, inks)]
    return tuple(Word(*item, box) for item, box in zip(items, boxes))


def _spread(rng, room_px: int, lengths: list[int], gaps: list[int]) -> list[int] | None:
    """Where each of the lengths begins: in order, each after at least its gap, the rest of the room at random."""
    slack = room_px - sum(lengths) - sum(gaps)
    if slack < 0:
        return None
    before = np.sort(rng.integers(0, slack + 1, len(lengths)))
    ends = np.cumsum(np.add(lengths, gaps))
    return [int(start) for start in before + ends - lengths - gaps[0] // 2]


@functools.cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(file, size_px, layout_engine=ImageFont.Layout.BASIC)  # there in every build of Pillow


@functools.lru_cache(1 << 16)
def _ink(font: str, text: str, size_px: int) -> tuple[int, int, int, int]:
    """The box of a word around the point where its baseline begins, with a pixel to spare on every side."""
    left, top, right, bottom = _font(font, size_px).getbbox(text, anchor="ls")
    return int(left) - 1, int(top) - 1, int(right) + 1, int(bottom) + 1


def draw(described: Page) -> Image.Image:
    image = Image.new("RGB", (described.image_px,) * 2, described.background)
    pen = ImageDraw.Draw(image)
    for word in described.words:
        ink = _ink(described.font, word.text, word.size_px)
        start = (word.box[0] - ink[0], word.box[1] - ink[1])
        pen.text(start, word.text, COLORS[word.color], _font(described.font, word.size_px), anchor="ls")
    return image


def questions(rng: np.random.Generator, described: Page, vocabulary: tuple[str, ...]) -> list[Asked]:
    """One of every type that the page has an unambiguous answer to; the words in them are of the vocabulary."""
    shown = described.words
    texts = [word.text for word in shown]
    number = rng.integers(len(shown))
    asked = [
        Asked("how many words are there?", str(len(shown)), "count"),
        Asked(f"what is word {number + 1}?", texts[number], "read_nth"),
        _present(rng, texts, vocabulary),
        _first(rng, texts),
    ]
    once = [word for word in shown if Counter(other.color for other in shown)[word.color] == 1]
    if once:
        word = pick(rng, once)
        asked.append(Asked(f"what is the {word.color} word?", word.text, "read_color"))
    for said, extreme in (("largest", max), ("smallest", min)):
        size_px = extreme(word.size_px for word in shown)
        of_size = [word.text for word in shown if word.size_px == size_px]
        if len(of_size) == 1:
            asked.append(Asked(f"what is the {said} word?", of_size[0], f"read_{said}"))
    corners = [name for name, (line, _) in CORNERS.items() if len(described.lines[line]) > 1]
    if corners and len(described.lines) > 1:
        name = pick(rng, corners)
        line, place = CORNERS[name]
        asked.append(Asked(f"what is the {name} word?", described.lines[line][place].text, "read_corner"))
    return asked


def _present(rng, texts, vocabulary) -> Asked:
    there = bool(rng.integers(2))
    word = pick(rng, texts)
    while not there and word in texts:
        word = pick(rng, vocabulary)
    return Asked(f"is {word} there?", "yes" if there else "no", "present")


def _first(rng, texts) -> Asked:
    one, other = sorted(rng.choice(len(texts), 2, replace=False))
    said = [texts[one], texts[other]][:: pick(rng, (1, -1))]
    return Asked(f"which comes first, {said[0]} or {said[1]}?", texts[one], "first")
