"""What can be had without looking at an image: the yardstick of a set of questions."""

import string
from collections import Counter, defaultdict
from collections.abc import Iterable

from vlm_jax.data.sources import Record


def question_only_baselines(records: Iterable[Record]) -> dict[str, tuple[int, float, float]]:
    """Type -> its questions, the exact match of the best single answer, and that of the best word to repeat.

    The last says the k-th word of every question, as in "which comes first, one or other?", with the best k. Both are
    fitted to the records that they are scored on.
    """
    asked = defaultdict(list)
    for record in records:
        for question, answer, kind in zip(
            record.questions, record.answers, record.types, strict=True
        ):
            asked[kind].append((question, answer))
    return {
        kind: (len(pairs), _constant(pairs), _repeating(pairs))
        for kind, pairs in sorted(asked.items())
    }


def _constant(pairs) -> float:
    return Counter(answer for _, answer in pairs).most_common(1)[0][1] / len(pairs)


def _repeating(pairs) -> float:
    right = Counter(
        place
        for question, answer in pairs
        for place, word in enumerate(question.split())
        if word.strip(string.punctuation) == answer
    )
    return max(right.values(), default=0) / len(pairs)
