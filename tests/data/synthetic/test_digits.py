"""Scenes of digits: none hidden or cut off; answers found once more from where the digits lie."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from vlm_jax.data.synthetic import digits
from vlm_jax.data.synthetic.builder import SyntheticConfig

every_size = pytest.mark.parametrize("image_px", (64, 200, 448))


def scenes(image_px, split="train", count=60, fold=0):
    for index in range(count):
        rng = np.random.default_rng([7, index])
        scene = digits.random_scene(rng, image_px, split, fold)
        yield scene, digits.questions(rng, scene)


@pytest.mark.parametrize("fold", (0, 1))
def test_a_fifth_of_every_digits_images_is_kept_for_the_test_split(fold):
    from sklearn.datasets import load_digits

    target = load_digits().target
    _, seen, held_out = digits.sources(fold)
    assert sorted(np.concatenate([*seen, *held_out])) == list(range(1797))
    for value in range(10):
        assert set(target[seen[value]]) == set(target[held_out[value]]) == {value}
        assert abs(len(held_out[value]) / (len(seen[value]) + len(held_out[value])) - 1 / 5) < 0.005
    for split, allowed in (("train", seen), ("validation", seen), ("test", held_out)):
        for scene, _ in scenes(64, split, fold=fold):
            assert all(digit.source in allowed[digit.value] for digit in scene.digits)


def test_a_held_out_image_is_as_like_a_seen_one_as_the_docs_say():
    """As images of one writer are."""
    images, seen, held_out = digits.sources()
    pixels = images.reshape(len(images), -1).astype(float)
    known, asked = (
        [(i, value) for value, found in enumerate(images_of) for i in found]
        for images_of in (seen, held_out)
    )
    (known, values), (asked, expected) = (np.transpose(pairs) for pairs in (known, asked))
    squares = (pixels[known] ** 2).sum(-1) - 2 * pixels[asked] @ pixels[known].T
    assert round(float(np.mean(values[squares.argmin(-1)] == expected)), 3) == 0.986


@every_size
def test_digits_are_whole_apart_and_alone(image_px):
    for scene, _ in scenes(image_px):
        pixels = np.asarray(digits.draw(scene)).astype(int)
        inked = (pixels != scene.background).any(axis=-1)
        taken = np.zeros((image_px, image_px), bool)
        for digit in scene.digits:
            box = (
                slice(digit.top_px, digit.top_px + digit.side_px),
                slice(digit.left_px, digit.right_px),
            )
            assert (
                min(digit.top_px, digit.left_px) >= 0 and taken[box].shape == (digit.side_px,) * 2
            )
            assert not taken[box].any(), "on another digit"
            assert inked[box].mean() > 0.2
            taken[box] = True
        assert not inked[~taken].any()


def answered(scene, question):
    values = [digit.value for digit in scene.digits]
    left, right = (
        min(scene.digits, key=key)
        for key in (lambda d: d.left_px, lambda d: -(d.left_px + d.side_px))
    )
    numbers = [int(number) for number in re.findall(r"\d", question)]
    if question == "how many digits are there?":
        return str(len(values))
    if question.startswith("how many"):
        return str(values.count(numbers[0]))
    if question == "what is the sum of all digits?":
        return str(sum(values))
    if question.startswith("what is the sum of the leftmost"):
        return str(left.value + right.value)
    if question.startswith("is the leftmost"):
        return "yes" if left.value > right.value else "no"
    if question.startswith("are there more"):
        return "yes" if values.count(numbers[0]) > values.count(numbers[1]) else "no"
    if question.startswith("which is drawn larger"):
        one, other = ([d for d in scene.digits if d.value == number] for number in numbers)
        return str(max((*one, *other), key=lambda digit: digit.side_px).value)
    if found := re.match(r"which digit is in the (\w+) (\w+) corner", question):
        y, x = (0 if word in ("top", "left") else scene.image_px for word in found.groups())
        nearest = min(
            scene.digits,
            key=lambda d: max(
                abs(d.top_px + d.side_px / 2 - y), abs(d.left_px + d.side_px / 2 - x)
            ),
        )
        return str(nearest.value)
    (named,) = [digit for digit in scene.digits if digit.value == numbers[0]]
    row = [d for d in scene.digits if d.cell[0] == named.cell[0] and d is not named]
    beside = [d for d in row if (d.left_px < named.left_px) == question.endswith("left?")]
    return str(min(beside, key=lambda d: abs(d.left_px - named.left_px)).value)


@every_size
def test_the_answers_follow_from_where_the_digits_lie(image_px):
    kinds = set()
    for scene, asked in scenes(image_px):
        for each in asked:
            assert answered(scene, each.question) == each.answer, each
            kinds.add(each.type)
    assert len(kinds) == 9


def test_no_held_out_image_of_one_fold_is_held_out_in_the_other():
    (_, _, first), (_, _, second) = digits.sources(0), digits.sources(1)
    assert not set(np.concatenate(first)) & set(np.concatenate(second))


def test_the_questions_of_a_transcript_can_be_answered_from_it():
    """From the grid alone, with a digit of equal size in the middle of each of its cells."""
    config = SyntheticConfig(name="x", image_px=64, images=(1, 1, 1), transcript=True)
    kinds = set()
    for index in range(30):
        _, asked = digits.Digits.example(
            SimpleNamespace(builder_config=config), np.random.default_rng(index), "train"
        )
        for each in asked:
            grid, _, question = each.question.rpartition("\n")
            values = [row.split(" ") for row in grid.splitlines()]
            found = tuple(
                digits.Digit(int(value), 0, (y, x), 20 * x + 2, 20 * y + 2, 16)
                for y, row in enumerate(values)
                for x, value in enumerate(row)
                if value != "."
            )
            scene = digits.Scene(20 * len(values), (255,) * 3, (0,) * 3, 0, found)
            assert answered(scene, question) == each.answer, each
            kinds.add(each.type)
    assert kinds == set(digits.TRANSCRIBED)
