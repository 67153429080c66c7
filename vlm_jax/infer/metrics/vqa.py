"""Accuracy of short answers with several human references: VQAv2 and TextVQA."""

import re
from collections.abc import Sequence

from vlm_jax.config import DataError
from vlm_jax.infer.metrics.memory import SEPARATOR, join_texts

# An answer is right if this many people gave it.
AGREEING = 3
MARKS = """;/[]"{}()=+\\_><@`,?!-"""
MARKS_TO_SPACES = str.maketrans(dict.fromkeys(MARKS, " "))
_MARK, _LETTER = f"[{re.escape(MARKS)}]", rf"[^\s{re.escape(MARKS)}]"
MARK = re.compile(_MARK)
# Begins with the mark, which is found faster than a letter.
MARK_IN_WORD = re.compile(f"{_MARK}(?<={_LETTER}{_MARK}){_MARK}*{_LETTER}")
ARTICLES = dict.fromkeys(("a", "an", "the"), "")
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
REPLACEMENTS = NUMBERS | CONTRACTIONS | ARTICLES
PERIOD = re.compile(r"\.(?!\d)")
GROUPED_DIGITS = re.compile(r"\d,\d")


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Returns the VQAv2 accuracy (Goyal et al. 2017; `vqaEval.py` of GT-Vision-Lab/VQA).

    Texts are normalized only if the references differ, as in that script.
    """
    first = _strip(references[0])
    texts = [prediction, *references]
    if any(_strip(reference) != first for reference in references[1:]):
        return _leave_one_out(normalize(join_texts(texts)))
    return _leave_one_out(list(map(_strip, texts)))


def text_vqa(prediction: str, references: Sequence[str]) -> float:
    """Returns the TextVQA accuracy (Singh et al. 2019): texts are always normalized.

    Before the rules of VQAv2, EvalAI's processor removes commas and question marks and separates
    `'s` (`_task_utils/vqa_eval_metric.py` of lmms-eval).
    """
    texts = join_texts([prediction, *references]).lower()
    texts = texts.replace(",", "").replace("?", "").replace("'s", " 's")
    return _leave_one_out(normalize(texts))


def _leave_one_out(texts: Sequence[str]) -> float:
    """Returns the mean accuracy of the first text against all others but one, each left out."""
    prediction, *references = texts
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


def normalize(joined: str) -> list[str]:
    """Returns the texts of `join_texts` as VQAv2's script compares them.

    Every mark becomes a space, which at the end of a word is the same as to remove it. The few
    texts with a mark in a word follow all rules.
    """
    words = replace_words(joined.translate(MARKS_TO_SPACES))
    texts = list(map(str.strip, words.split(SEPARATOR)))
    for match in MARK_IN_WORD.finditer(joined):
        i = joined.count(SEPARATOR, 0, match.start())
        texts[i] = replace_words(remove_punctuation(joined.split(SEPARATOR)[i]))
    return texts


def replace_words(text: str) -> str:
    """Removes periods, unless a digit follows, and articles.

    Numbers up to ten become digits, and contractions get their apostrophes.
    """
    if "." in text:
        text = PERIOD.sub("", text)
    words = text.lower().split()
    return " ".join(filter(None, map(REPLACEMENTS.get, words, words)))


def remove_punctuation(text: str) -> str:
    """Removes a mark that is beside a space anywhere in the text; others become spaces.

    All are removed if the text has a comma between digits.
    """
    text = _strip(text)
    marks = set(MARK.findall(text))
    has_grouped_digits = "," in marks and GROUPED_DIGITS.search(text) is not None
    cleaned = text
    for mark in marks:
        is_removed = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if is_removed else " ")
    return cleaned
