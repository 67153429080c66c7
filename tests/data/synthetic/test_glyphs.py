"""Pages of words: no word is hidden, cut off or ambiguous; boxes alone give the answers again."""

import itertools
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from vlm_jax.data.synthetic import glyphs
from vlm_jax.data.synthetic import pages as paper
from vlm_jax.data.synthetic.blind_baselines import Asked, floors
from vlm_jax.data.synthetic.builder import SyntheticConfig
from vlm_jax.data.synthetic.layout import random_page

SIZES_PX = (64, 200, 448)
every_size = pytest.mark.parametrize("image_px", SIZES_PX)
every_page = pytest.mark.parametrize(
    "image_px, cell_px", [*((px, None) for px in SIZES_PX), (64, 6), (64, 8), (448, 8)]
)


def pages(image_px, split="train", count=60, cell_px=None, fold=0):
    for index in range(count):
        rng = np.random.default_rng([7, index])
        page = random_page(rng, image_px, split, cell_px, fold)
        yield page, glyphs.questions(rng, page, paper.vocabulary(split, fold))


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@every_page
def test_no_word_leaves_the_page_or_touches_another(image_px, cell_px):
    for page, _ in pages(image_px, cell_px=cell_px):
        boxes = [word.box for word in page.words]
        assert all(0 <= l < r <= image_px and 0 <= t < b <= image_px for l, t, r, b in boxes)  # noqa: E741
        assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


@every_size
def test_ink_is_in_the_boxes_alone_and_of_the_words_color(image_px):
    for page, _ in pages(image_px, count=20):
        pixels = np.asarray(paper.draw(page)).astype(int)
        inked = (pixels != page.background).any(axis=-1)
        for word in page.words:
            left, top, right, bottom = word.box
            inside = pixels[top:bottom, left:right].reshape(-1, 3)
            assert np.abs(inside - paper.COLORS[word.color]).sum(axis=-1).min() < 60
            assert inked[top:bottom, left:right].any()
            edges = inked[top:bottom, [left, right - 1]], inked[[top, bottom - 1], left:right]
            assert not any(edge.any() for edge in edges)
            inked[top:bottom, left:right] = False
        assert not inked.any()


@pytest.mark.parametrize("cell_px", (6, 8))
def test_typewritten_letters_stand_in_cells_of_their_own(cell_px):
    """Every word in whole cells, each with the ink of one letter, and at the very edge, too."""
    lefts = set()
    for page, _ in pages(64, cell_px=cell_px, count=100):
        pixels = np.asarray(paper.draw(page)).astype(int)
        inked = (pixels != page.background).any(axis=-1)
        for word in page.words:
            left, top, right, bottom = word.box
            lefts.add(left)
            assert not (left % cell_px or top % (2 * cell_px)) and bottom - top == 2 * cell_px
            assert right - left == cell_px * len(word.text)
            cells = inked[top:bottom, left:right].reshape(bottom - top, -1, cell_px)
            assert cells.any(axis=(0, 2)).all()
            inked[top:bottom, max(left - 1, 0) : right + 1] = (
                False  # slanted letters lean over by a pixel
            )
        assert not inked.any()
    assert {0, cell_px} < lefts


def by_place(page):
    """Words in reading order, from their boxes: words whose heights overlap share a line."""
    lines = []
    for word in sorted(page.words, key=lambda word: word.box[3]):
        if lines and word.box[1] < min(other.box[3] for other in lines[-1]):
            lines[-1].append(word)
        else:
            lines.append([word])
    return [sorted(line, key=lambda word: word.box[0]) for line in lines]


def answered(page, question):
    lines = by_place(page)
    words = [word for line in lines for word in line]
    if question == "how many words are there?":
        return str(len(words))
    if question == "what does it say?":
        return " ".join(word.text for word in words)
    if found := re.fullmatch(r"what is word (\d+)\?", question):
        return words[int(found[1]) - 1].text
    if found := re.fullmatch(r"is (\w+) there\?", question):
        return "yes" if found[1] in {word.text for word in words} else "no"
    if found := re.fullmatch(r"which comes first, (\w+) or (\w+)\?", question):
        return min(found.groups(), key=[word.text for word in words].index)
    if found := re.fullmatch(r"what is the (\w+) word\?", question):
        if found[1] in ("largest", "smallest"):
            sizes = sorted(words, key=lambda word: word.size_px, reverse=found[1] == "largest")
            assert sizes[0].size_px != sizes[1].size_px
            return sizes[0].text
        (word,) = [word for word in words if word.color == found[1]]
        return word.text
    vertical, horizontal = re.fullmatch(r"what is the (\w+) (\w+) word\?", question).groups()
    line = lines[0 if vertical == "top" else -1]
    return line[0 if horizontal == "left" else -1].text


@every_page
def test_the_answers_follow_from_where_the_words_stand(image_px, cell_px):
    kinds = set()
    for page, asked in pages(image_px, cell_px=cell_px):
        for each in asked:
            assert answered(page, each.question) == each.answer, each
            kinds.add(each.type)
    assert len(kinds) == (7 if cell_px else 9)  # typewritten words are all of one size


def test_a_transcript_says_what_stands_on_the_page():
    """So that a decoder can answer from it, without the image."""
    drawing = SyntheticConfig(name="x", image_px=64, images=(1, 1, 1), cell_px=8, transcript=True)
    for index in range(5):
        _, asked = glyphs.Glyphs.example(
            SimpleNamespace(builder_config=drawing), np.random.default_rng(index), "train"
        )
        page = random_page(np.random.default_rng(index), 64, "train", 8)
        said = "\n".join(
            " ".join(f"{word.color} {word.text}" for word in line) for line in by_place(page)
        )
        for each in asked:
            transcript, _, question = each.question.rpartition("\n")
            assert transcript == said
            assert answered(page, question) == each.answer


@pytest.mark.parametrize("fold", (0, 1))
def test_test_pages_have_words_and_a_font_that_are_never_seen(fold):
    seen, held_out = map(set, paper.words(fold))
    assert not seen & held_out
    for cell_px in (None, 8):
        seen_fonts, (font,) = (paper.fonts(split, cell_px, fold) for split in ("train", "test"))
        assert font not in seen_fonts
        assert paper.fonts("validation", cell_px, fold) == seen_fonts
    for split, cell_px in itertools.product(("train", "validation", "test"), (None, 8)):
        vocabulary = held_out if split == "test" else seen
        for page, asked in pages(64, split, cell_px=cell_px, fold=fold):
            assert page.font in paper.fonts(split, cell_px, fold)
            assert {word.text for word in page.words} <= vocabulary
            assert all(
                set(each.answer.split()) <= vocabulary
                for each in asked
                if each.type.startswith("read")
            )
            assert all(
                each.question.split()[1] in vocabulary for each in asked if each.type == "present"
            )


def test_the_test_splits_of_the_folds_share_neither_words_nor_fonts():
    assert not set(paper.vocabulary("test", 0)) & set(paper.vocabulary("test", 1))
    for cell_px in (None, 8):
        assert paper.fonts("test", cell_px, 0) != paper.fonts("test", cell_px, 1)


@pytest.mark.parametrize("fold", (0, 1))
def test_every_letter_of_a_held_out_word_is_learned_at_its_place(fold):
    """So that a reader of letters can read them."""
    seen, held_out = (
        {(len(word), i, word[i]) for word in words for i in range(len(word))}
        for words in paper.words(fold)
    )
    assert held_out <= seen


def fixed_by(letters, words):
    """The share of the words that no other begins like, in so many letters."""
    begun = Counter(word[:letters] for word in words)
    return sum(begun[word[:letters]] == 1 for word in words) / len(words)


def test_what_the_list_of_words_gives_away_is_what_the_docs_say():
    seen, held_out = (
        {size: [w for w in words if len(w) == size] for size in (3, 5)} for words in paper.words()
    )
    assert (len(seen[5]), len(held_out[5]), len(held_out[3])) == (1176, 276, 109)
    assert fixed_by(4, seen[5]) == 1
    assert round(fixed_by(3, seen[5]), 2) == 0.64
    assert not {word[:4] for word in held_out[5]} & {word[:4] for word in seen[5]}
    assert sum(any(word in longer for longer in seen[5]) for word in held_out[3]) == 109
    assert sum(any(longer.endswith(word) for longer in seen[5]) for word in held_out[3]) == 105


@pytest.mark.parametrize("font", (*paper.SEEN_FONTS, paper.HELD_OUT_FONTS[0]))
def test_the_smallest_letters_are_as_high_as_the_docs_say(font):
    for letter, height_px in (("x", 5), ("d", 8)):
        _, top, _, bottom = paper._font(font, paper.MIN_SIZE_PX).getbbox(letter, anchor="ls")
        assert bottom - top == height_px


@pytest.mark.parametrize("cell_px", (6, 7, 8))
def test_typewritten_letters_leave_their_cells_by_hardly_any_ink(cell_px):
    fonts, letters = (
        paper.fonts("train", cell_px) + paper.fonts("test", cell_px),
        "".join(paper.words()[0]),
    )
    most = {
        font: max(ink_outside(font, cell_px, letter) for letter in set(letters)) for font in fonts
    }
    assert max(most.values()) < 0.013
    assert not any(most[font] for font in fonts if "Oblique" not in font)


def ink_outside(font, cell_px, letter):
    """The share of a letter's ink that is outside of its cell."""
    page = paper.Typewritten(6 * cell_px, font, (0, 0, 0), cell_px=cell_px)
    (size_px,) = page.sizes_px
    cell = (2 * cell_px, 2 * cell_px, 3 * cell_px, 4 * cell_px)  # left, top, right, bottom
    drawn = paper.draw(replace(page, lines=((paper.Word(letter, size_px, "red", cell),),)))
    ink = np.asarray(drawn)[..., 0].astype(int)
    return 1 - ink[cell[1] : cell[3], cell[0] : cell[2]].sum() / ink.sum()


def test_a_larger_page_holds_more_words_in_more_sizes():
    assert [paper.max_words(px) for px in (64, 224, 448)] == [4, 9, 16]
    assert [len(paper.sizes_px(px)) for px in (64, 224, 448)] == [2, 4, 6]
    assert {paper.sizes_px(px)[0] for px in (64, 224, 448)} == {paper.MIN_SIZE_PX}


def test_a_reader_that_ignores_what_is_asked_names_one_word_of_four():
    """On pages of one to four words a fixed word is right for 0.52 of the questions.

    The first word of the page is also the first of two of its words in three cases of four.
    """
    asked = []
    for index, (_, pairs) in enumerate(pages(64, "test", 800, 8)):
        asked += [Asked(index, pair.question, pair.answer, pair.type) for pair in pairs]
    best = floors(asked)
    expected = {"read_nth": 0.52, "read_color": 0.52, "first": 0.75, "present": 0.5}
    for kind, floor in expected.items():
        assert best[kind] == pytest.approx(floor, abs=0.06), kind
    assert 0.2 < best["read_corner"] < 0.4
    assert best["read_all"] < 0.05
