"""Baselines that do not look at the image, for a set of questions."""

import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

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


def _best_constant(pairs: Sequence[tuple[str, str]]) -> float:
    return Counter(answer for _, answer in pairs).most_common(1)[0][1] / len(pairs)


def _best_repeated_word(pairs: Sequence[tuple[str, str]]) -> float:
    correct = Counter()  # by position of the word
    for question, answer in pairs:
        for position, word in enumerate(question.split()):
            if word.strip(string.punctuation) == answer:
                correct[position] += 1
    return max(correct.values(), default=0) / len(pairs)
