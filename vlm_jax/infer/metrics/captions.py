"""Scores of captions: CIDEr-D, BLEU and ROUGE-L."""

import functools
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq

from vlm_jax.config import DataError
from vlm_jax.infer.metrics.intervals import Estimate, estimate_of_sums
from vlm_jax.infer.metrics.memory import SEPARATOR, join_texts, remember

ORDERS = 4  # n-grams of 1 to 4 words
LENGTH_SIGMA = 6.0
CIDER_SCALE = 10.0
CACHED_TEXTS = 2**16  # texts with their tokens: answers and references repeat

TOKEN = re.compile(
    r"""
    n't\b | '(?:s|re|ve|ll|d|m)\b    # of a contraction
    | (?:[a-z]\.){2,}                # u.s.a.
    | (?:mr|mrs|ms|dr|st|jr|co|inc|ltd|etc)\.
    | @\w+ | \#[a-z]\w*
    | (?<!\w)[+-]?\d+(?:[.,:]\d+)+   # 1,000 or 12:30
    | (?<!\w)[+-]\d+
    | \w+(?:[-/']\w+)*               # two-way
    | [!?]+ | \.\.+ | --+ | \S
    """,
    re.VERBOSE,
)
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
# Words that are two tokens.
SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# A word without these is a token of BLEU's tokenizer 13a; other marks than .,- always are tokens.
BLEU_MARK = re.compile(r"[!-&(-/:-@\[-`{-~]")
HYPHEN_AT_END = "-\n"  # of a line: the tokenizer joins the word with the next line
# Code of a character -> the same in a word of ROUGE, else a space.
ROUGE_CHARACTERS = defaultdict(
    lambda: " ", {ord(c): c for c in string.ascii_lowercase + string.digits + SEPARATOR}
)
# Tokens that are left out. Several marks such as "?!" are a word.
PUNCTUATION = re.compile(r"""[?!,:;'"`\u2018-\u201d\u2013\u2014\u2026]|\.+|-+""")


def tokenize_caption(text: str) -> list[str]:
    """Returns lower-case words without punctuation, about as Stanford's PTB tokenizer writes them.

    COCO's script (`tokenizer/ptbtokenizer.py` of pycocoevalcap) runs that tokenizer in Java. Rare
    abbreviations and symbols may be tokenized in another way.
    """
    text = CONTRACTION.sub(r" \1", text.lower().replace("\u2019", "'"))
    words = []
    for token in TOKEN.findall(text):
        if not PUNCTUATION.fullmatch(token):
            words += SPLIT.get(token, BRACKETS.get(token, token)).split()
    return words


class _Caption(NamedTuple):
    """n-grams of a caption with TF-IDF weights."""

    weights: dict[tuple[str, ...], float]
    norms: list[float]  # of each order
    length: int  # number of bigrams


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Returns CIDEr-D of each caption, from 0 to 10.

    The weight of an n-gram depends on the references of all questions.

    Source: Vedantam et al. 2015, section 6; `cider/cider_scorer.py` of pycocoevalcap.

    Raises:
      DataError: there is only one question, for which every weight would be 0.
    """
    if len(predictions) < 2:
        raise DataError("the weight of a word needs the references of at least 2 questions")
    reference_counts = [[_caption_ngrams(text) for text in texts] for texts in references]
    frequencies = Counter()
    for counts in reference_counts:
        frequencies.update(set().union(*counts))
    log_questions = math.log(len(predictions))

    def weigh(counts: Counter) -> _Caption:
        weights = {}
        squares = [0.0] * ORDERS
        for ngram, count in counts.items():
            weight = count * (log_questions - math.log(max(1, frequencies[ngram])))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight**2
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Caption(weights, [math.sqrt(square) for square in squares], length)

    scores = []
    for prediction, counts in zip(predictions, reference_counts, strict=True):
        caption = weigh(_caption_ngrams(prediction))
        similarities = [_similarity(caption, weigh(reference)) for reference in counts]
        scores.append(CIDER_SCALE * sum(similarities) / len(similarities))
    return scores


@functools.lru_cache(maxsize=CACHED_TEXTS)
def _caption_ngrams(text: str) -> Counter:
    return _count_ngrams(tokenize_caption(text))


def _count_ngrams(words: Sequence[str]) -> Counter:
    ngrams = []
    for order in range(1, ORDERS + 1):
        ngrams += [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
    return Counter(ngrams)


def _similarity(caption: _Caption, reference: _Caption) -> float:
    """Returns the mean over the orders of the clipped cosine, with a penalty for other lengths."""
    products = [0.0] * ORDERS
    for ngram, weight in caption.weights.items():
        other = reference.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other
    cosines = 0.0
    for product, a, b in zip(products, caption.norms, reference.norms):
        cosines += product / (a * b) if a and b else product
    difference = caption.length - reference.length
    return cosines / ORDERS * math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))


@functools.cache
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def bleu(prediction: str, references: Sequence[str]) -> list[int]:
    """Returns the counts from which BLEU is computed (Papineni et al. 2002).

    They are the matching n-grams of each order, and the lengths of the prediction and of the
    reference nearest in length, as in `metrics/bleu.py` of sacrebleu. Its `sentence_score` counts
    the n-grams of all references, which takes longer than to search them for the n-grams of the
    prediction.
    """
    text, *texts = _bleu_texts([prediction, *references])
    words, lengths = text.split(), [reference.count(" ") - 1 for reference in texts]
    length = reference_length = len(words)
    if length not in lengths:
        # Of two that are equally near, the shorter.
        reference_length = min(lengths, key=lambda other: (abs(other - length), other))
    if len(set(words)) < length:
        matches = _clipped_matches(words, texts)
    else:
        matches = _matches(words, "".join(texts))
    return [*matches, length, reference_length]


def _matches(words: Sequence[str], references: str) -> list[int]:
    """Counts the n-grams of words that differ from each other which the references have."""
    matches = [0] * ORDERS
    for order in range(1, ORDERS + 1):
        for i in range(len(words) - order + 1):
            matches[order - 1] += f" {' '.join(words[i : i + order])} " in references
        if not matches[order - 1]:
            # Nor does a longer n-gram match.
            break
    return matches


def _clipped_matches(words: Sequence[str], references: Sequence[str]) -> list[int]:
    """Counts matching n-grams, each as often as the reference with the most of them has it."""
    counts = [_count_ngrams(reference.split()) for reference in references]
    matches = [0] * ORDERS
    for ngram, count in _count_ngrams(words).items():
        matches[len(ngram) - 1] += min(count, max(reference[ngram] for reference in counts))
    return matches


def _bleu_texts(texts: Sequence[str]) -> list[str]:
    """Returns the tokens of each text with a space before and after each."""
    joined = join_texts(texts)
    if HYPHEN_AT_END in joined:
        words = join_texts([_bleu().tokenizer(text.rstrip()) for text in texts]).split()
    else:
        words = [word if word.isalnum() else _bleu_word(word) for word in joined.split()]
    return " ".join(["", *filter(None, words), ""]).split(SEPARATOR)


@remember
def _bleu_word(word: str) -> str:
    """Returns the tokens of a text without spaces; the rules never look beyond a space."""
    return " ".join(_bleu().tokenizer(word).split()) if BLEU_MARK.search(word) else word


def corpus_bleu(counts: Sequence[Sequence[int]]) -> dict[str, Estimate]:
    """Returns sacrebleu's BLEU of many answers, from 0 to 100, with a bootstrap interval."""
    matches, lengths = np.split(np.array(counts), [ORDERS], axis=1)
    # A prediction of n words has n - 1 bigrams.
    ngrams = np.maximum(lengths[:, :1] - np.arange(ORDERS), 0)
    return {"": estimate_of_sums(np.hstack([matches, ngrams, lengths]), _bleu_of_sums)}


def _bleu_of_sums(sums: np.ndarray) -> float:
    *ngrams, prediction_length, reference_length = sums.tolist()
    matches, totals = ngrams[:ORDERS], ngrams[ORDERS:]
    lengths = (prediction_length, reference_length)
    return _bleu().compute_bleu(matches, totals, *lengths, smooth_method="exp").score


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Returns the F measure of the longest common subsequence of words with the best reference.

    Source: Lin 2004; `rouge_scorer.py` of rouge-score, with the words of its tokenizer.
    """
    words, *reference_words = _rouge_words([prediction, *references])
    different_words = set(words)
    best = 0.0
    for reference in reference_words:
        if different_words.isdisjoint(reference):
            continue
        common = LCSseq.similarity(words, reference)
        # The harmonic mean of common / len(words) and common / len(reference).
        best = max(best, 2 * common / (len(words) + len(reference)))
    return best


def _rouge_words(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yields the words of each text."""
    characters = join_texts(texts).lower().translate(ROUGE_CHARACTERS)
    return map(str.split, characters.split(SEPARATOR))
