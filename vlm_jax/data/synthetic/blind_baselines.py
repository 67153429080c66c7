"""Baselines that do not look at the image, or read it and ignore what is asked about it."""

import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vlm_jax.data.builders.records import Record


def question_only_baselines(
    records: Iterable[Record],
) -> dict[str, tuple[int, float, float]]:
    """Scores the best constant answer and the best repeated word of the question.

    The second answers every question with its k-th word, as in "which comes first, one or other?".
    Both are fitted to the records that they are scored on.

    Returns:
      Type -> number of questions, exact match of the best single answer, exact match of the best k.
    """
    pairs_by_type = defaultdict(list)
    for record in records:
        for question, answer, kind in zip(
            record.questions, record.answers, record.types, strict=True
        ):
            pairs_by_type[kind].append((question, answer))
    return {
        kind: (len(pairs), _best_constant(pairs), _best_repeated_word(pairs))
        for kind, pairs in sorted(pairs_by_type.items())
    }


class Asked(NamedTuple):
    """A question with its right answer."""

    image_id: int | str
    question: str
    answer: str
    type: str


def floors(questions: Iterable[Asked]) -> dict[str, float]:
    """Exact match of the best reader that ignores what is asked; returns type -> score.

    It gives all questions of a type the same answer, or repeats their k-th word, or names the k-th
    word of the page, counted from its beginning or its end. The words of a page are the longest
    answer about it: of the type with the longest answers, where these have several words.
    """
    by_type = defaultdict(list)
    for asked in questions:
        by_type[asked.type].append(asked)
    page_type = max(by_type, key=lambda kind: _mean_words(by_type[kind]), default=None)
    pages = {asked.image_id: asked.answer.split() for asked in by_type.get(page_type, ())}
    has_pages = page_type is not None and _mean_words(by_type[page_type]) > 1
    best = {}
    for kind, of_type in sorted(by_type.items()):
        pairs = [(asked.question, asked.answer) for asked in of_type]
        best[kind] = max(_best_constant(pairs), _best_repeated_word(pairs))
        if has_pages and kind != page_type:
            best[kind] = max(best[kind], _best_word_of_page(of_type, pages))
    return best


def _mean_words(of_type: Sequence[Asked]) -> float:
    return sum(len(asked.answer.split()) for asked in of_type) / len(of_type)


def _best_word_of_page(of_type: Sequence[Asked], pages: Mapping[int | str, list[str]]) -> float:
    correct = Counter()  # by position of the word, from the beginning and from the end
    for asked in of_type:
        words = pages.get(asked.image_id, [])
        for position in range(-len(words), len(words)):
            if words[position] == asked.answer:
                correct[position] += 1
    return max(correct.values(), default=0) / len(of_type)


def _best_constant(pairs: Sequence[tuple[str, str]]) -> float:
    return Counter(answer for _, answer in pairs).most_common(1)[0][1] / len(pairs)


def _best_repeated_word(pairs: Sequence[tuple[str, str]]) -> float:
    correct = Counter()  # by position of the word
    for question, answer in pairs:
        for position, word in enumerate(question.split()):
            if word.strip(string.punctuation) == answer:
                correct[position] += 1
    return max(correct.values(), default=0) / len(pairs)
