"""Scores of questions with few possible answers: letters of choices, yes and no."""

from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax.config import DataError
from vlm_jax.infer.metrics.intervals import Estimate, estimate_share

# Without the texts of the choices. The ninth letter is a word, too.
LETTERS = "ABCDEFGH"
STRIPPED = ",.!?;:'"
# A shorter answer does not quote a choice.
FEWEST_WORDS_OF_QUOTE = 6
NEGATIONS = frozenset(("No", "not", "no"))


def multiple_choice(prediction: str, references: Sequence[str], choices: Sequence[str]) -> bool:
    """Returns whether the letter that the prediction chooses is a reference.

    A prediction from which no letter can be parsed is wrong; MMMU's script guesses one at random.

    Args:
      prediction: an answer, such as "(B)", "B." or a sentence that quotes a choice.
      references: letters.
      choices: texts of the choices A, B, ...; empty: the letters A to H, and no quotes.

    Source: MMMU (Yue et al. 2024), `_task_utils/mmmu_mcq_utils.py` of lmms-eval.

    Raises:
      DataError: a reference is not the letter of a choice.
    """
    letters = [chr(ord("A") + i) for i in range(len(choices))] or list(LETTERS)
    wrong = [reference for reference in references if reference not in letters]
    if wrong:
        raise DataError(
            f"the reference {wrong[0]!r} is not a letter of {letters[0]} to {letters[-1]}"
        )
    return parse_choice(prediction, letters, choices) in references


def parse_choice(text: str, letters: Sequence[str], choices: Sequence[str]) -> str | None:
    """Returns the letter that a text chooses, the last of several; None if it chooses none.

    "(B)" goes before "B ", that before "B.", and that before the quoted text of a choice.
    """
    for mark in STRIPPED:
        text = text.strip(mark)
    text = f" {text} "
    bracketed = [letter for letter in letters if f"({letter})" in text]
    if bracketed:
        return max(bracketed, key=lambda letter: text.rfind(f"({letter})"))
    named = [letter for letter in letters if f"{letter} " in text]
    named = named or [letter for letter in letters if f"{letter}." in text]
    if named:
        # The first if none stands alone between spaces, as in MMMU's script.
        return max(named, key=lambda letter: text.rfind(f" {letter} "))
    if len(text.split()) < FEWEST_WORDS_OF_QUOTE:
        return None
    text = text.lower()
    positions = {}
    for letter, choice in zip(letters, choices):
        if choice.lower() in text:
            positions[letter] = text.rfind(choice.lower())
    return max(positions, key=positions.get) if positions else None


class YesNo(NamedTuple):
    """An answer and its reference: yes, or no."""

    predicted: bool
    true: bool

    @property
    def is_right(self) -> bool:
        return self.predicted == self.true


def pope(prediction: str, references: Sequence[str]) -> YesNo:
    """Returns the parsed answer: no if its first sentence has "No", "not" or "no", else yes.

    Source: POPE (Li et al. 2023), `evaluate.py` of AoiDragon/POPE.

    Raises:
      DataError: the reference is not one of yes and no.
    """
    labels = {reference.strip().lower() for reference in references}
    if labels not in ({"yes"}, {"no"}):
        raise DataError(f"the reference {references[0]!r} must be yes or no")
    sentence, _, _ = prediction.partition(".")
    words = sentence.replace(",", "").split(" ")
    return YesNo(NEGATIONS.isdisjoint(words), labels == {"yes"})


def pope_rates(answers: Sequence[YesNo]) -> dict[str, Estimate]:
    """Returns the accuracy (""), precision, recall and F1 of yes, and the share of answers yes.

    F1 is 2 J / (1 + J) of the share J of right answers among those where yes is predicted or true,
    and so are the ends of its interval.
    """
    both = sum(answer.predicted and answer.true for answer in answers)
    predicted = sum(answer.predicted for answer in answers)
    true = sum(answer.true for answer in answers)
    right = sum(answer.is_right for answer in answers)
    jaccard = estimate_share(both, predicted + true - both)
    return {
        "": estimate_share(right, len(answers)),
        "precision": estimate_share(both, predicted),
        "recall": estimate_share(both, true),
        "f1": Estimate(_f1(jaccard.mean), _f1(jaccard.low), _f1(jaccard.high)),
        "yes_share": estimate_share(predicted, len(answers)),
    }


def _f1(jaccard: float) -> float:
    return 2 * jaccard / (1 + jaccard)
