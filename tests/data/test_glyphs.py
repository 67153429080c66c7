"""Pages of words: nothing hidden, cut off or ambiguous; answers found once more from where the words stand."""

import re

import numpy as np
import pytest

from vlm_jax.data import glyphs

SIZES_PX = (64, 200, 448)
every_size = pytest.mark.parametrize("image_px", SIZES_PX)


def pages(image_px, split="train", count=60):
    for index in range(count):
        rng = np.random.default_rng([7, index])
        page = glyphs.page(rng, image_px, split)
        yield page, glyphs.questions(rng, page, glyphs.pool(split))


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@every_size
def test_no_word_leaves_the_page_or_touches_another(image_px):
    for page, _ in pages(image_px):
        boxes = [word.box for word in page.words]
        assert all(0 <= l < r <= image_px and 0 <= t < b <= image_px for l, t, r, b in boxes)  # noqa: E741
        assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


@every_size
def test_ink_is_in_the_boxes_alone_and_of_the_words_color(image_px):
    for page, _ in pages(image_px, count=20):
        pixels = np.asarray(glyphs.draw(page)).astype(int)
        inked = (pixels != page.background).any(axis=-1)
        for word in page.words:
            left, top, right, bottom = word.box
            inside = pixels[top:bottom, left:right].reshape(-1, 3)
            assert np.abs(inside - glyphs.COLORS[word.color]).sum(axis=-1).min() < 60
            assert inked[top:bottom, left:right].any()
            edges = inked[top:bottom, [left, right - 1]], inked[[top, bottom - 1], left:right]
            assert not any(edge.any() for edge in edges)
            inked[top:bottom, left:right] = False
        assert not inked.any()


def by_place(page):
    """The words in reading order, from their boxes alone: those whose heights overlap stand on one line."""
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


@every_size
def test_the_answers_follow_from_where_the_words_stand(image_px):
    kinds = set()
    for page, asked in pages(image_px):
        for each in asked:
            assert answered(page, each.question) == each.answer, each
            kinds.add(each.type)
    assert len(kinds) == 8


def test_test_pages_have_words_and_a_font_that_are_never_seen():
    seen, held_out = map(set, glyphs.words())
    assert not seen & held_out
    assert not set(glyphs.SEEN_FONTS) & set(glyphs.HELD_OUT_FONTS)
    for split, vocabulary, fonts in (
        ("train", seen, glyphs.SEEN_FONTS),
        ("validation", seen, glyphs.SEEN_FONTS),
        ("test", held_out, glyphs.HELD_OUT_FONTS),
    ):
        for page, asked in pages(64, split):
            assert page.font in fonts
            assert {word.text for word in page.words} <= vocabulary
            assert all(each.answer in vocabulary for each in asked if each.type.startswith("read"))
            assert all(each.question.split()[1] in vocabulary for each in asked if each.type == "present")


def test_every_letter_of_a_held_out_word_is_learned_at_its_place():
    """So that a reader of letters can read them."""
    seen, held_out = ({(len(word), i, word[i]) for word in words for i in range(len(word))} for words in glyphs.words())
    assert held_out <= seen


def test_a_larger_page_holds_more_words_in_more_sizes():
    assert [glyphs.most_words(px) for px in (64, 224, 448)] == [4, 9, 16]
    assert [len(glyphs.sizes_px(px)) for px in (64, 224, 448)] == [2, 4, 6]
    assert {glyphs.sizes_px(px)[0] for px in (64, 224, 448)} == {glyphs.SMALLEST_PX}
