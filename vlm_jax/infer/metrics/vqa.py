"""Accuracy of short answers with several human references: VQAv2 and TextVQA."""

import re
from collections.abc import Sequence

from vlm_jax.config import DataError
from vlm_jax.infer.metrics.memory import remember

# An answer is right if this many people gave it.
AGREEING = 3
MARK = re.compile(r"""[;/\[\]"{}()=+\\_><@`,?!-]""")
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# A word of the table that lacks one apostrophe gets it back.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
"""


def _contraction_table() -> dict[str, str]:
    """Returns spelling -> word, as in `contractions` of vqaEval.py."""
    table = {}
    for word in _CONTRACTIONS.split():
        for match in re.finditer("'", word):
            table[word[: match.start()] + word[match.end() :]] = word
    return table


# The script has one entry the other way round.
CONTRACTIONS = _contraction_table() | {"somebody'd": "somebodyd"}
REPLACEMENTS = NUMBERS | CONTRACTIONS
CHANGED_WORDS = ARTICLES.union(REPLACEMENTS)
PERIOD = re.compile(r"\.(?!\d)")
GROUPED_DIGITS = re.compile(r"\d,\d")


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Returns the VQAv2 accuracy (Goyal et al. 2017; `vqaEval.py` of GT-Vision-Lab/VQA).

    Texts are normalised only if the references differ, as in that script.
    """
    is_different = any(_strip(reference) != _strip(references[0]) for reference in references[1:])
    clean = normalise if is_different else _strip
    return _leave_one_out(clean(prediction), list(map(clean, references)))


def text_vqa(prediction: str, references: Sequence[str]) -> float:
    """Returns the TextVQA accuracy (Singh et al. 2019): texts are always normalised.

    Before the rules of VQAv2, EvalAI's processor removes commas and question marks and separates
    `'s` (`_task_utils/vqa_eval_metric.py` of lmms-eval).
    """
    references = list(map(_normalise_text_vqa, references))
    return _leave_one_out(_normalise_text_vqa(prediction), references)


def _leave_one_out(prediction: str, references: Sequence[str]) -> float:
    """Returns the mean over the references of the accuracy against the others."""
    count = len(references)
    if count < 2:
        raise DataError("the rule compares with several references, and there is only one")
    matches = references.count(prediction)
    # Leaving out a match leaves one match less.
    of_match = min(1.0, (matches - 1) / AGREEING)
    of_other = min(1.0, matches / AGREEING)
    return (matches * of_match + (count - matches) * of_other) / count


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@remember
def _normalise_text_vqa(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _apply_rules(text)


def _apply_rules(text: str) -> str:
    """Returns the text as VQAv2's script compares it.

    A punctuation mark is removed if it stands beside a space anywhere in the text, or if the text
    has a comma between digits; otherwise it becomes a space. A period is removed unless a digit
    follows. Numbers up to ten become digits, articles are dropped, and contractions get their
    apostrophes.
    """
    if MARK.search(text):
        text = _remove_punctuation(_strip(text))
    if "." in text:
        text = PERIOD.sub("", text)
    words = text.lower().split()
    if not CHANGED_WORDS.isdisjoint(words):
        words = [REPLACEMENTS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(words)


normalise = remember(_apply_rules)


def _remove_punctuation(text: str) -> str:
    marks = set(MARK.findall(text))
    has_grouped_digits = "," in marks and GROUPED_DIGITS.search(text) is not None
    cleaned = text
    for mark in marks:
        is_removed = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if is_removed else " ")
    return cleaned
