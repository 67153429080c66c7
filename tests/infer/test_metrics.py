"""Metrics have the values of the programs that define them, and honest intervals."""

import importlib.util
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from vlm_jax.config import ConfigError, DataError
from vlm_jax.infer.metrics import captions, choices, intervals, vqa
from vlm_jax.infer.metrics.captions import tokenize_caption
from vlm_jax.infer.metrics.memory import join_texts
from vlm_jax.infer.metrics.scores import (
    Reference,
    answer_scores,
    check_references,
    describe_numbers,
    evaluate_metric,
    metric_keys,
    metric_of,
    number_names,
    parse_score,
    score_names,
    summarize,
)
from vlm_jax.infer.metrics.table import METRICS, check_metrics, of_answers

# Computed by the programs that it names, on inputs of our own.
REFERENCE_VALUES = json.loads((Path(__file__).parent / "metric_cases.json").read_text())


def as_references(cases):
    return [
        Reference(case["references"], f"case {i}", choices=case.get("choices", ()))
        for i, case in enumerate(cases)
    ]


def values(metric, cases):
    predictions = [case["prediction"] for case in cases]
    return evaluate_metric(metric, predictions, as_references(cases))


def test_every_metric_has_reference_values():
    assert set(of_answers(METRICS)) - REFERENCE_VALUES.keys() == {"exact_match"}


@pytest.mark.parametrize("metric", REFERENCE_VALUES)
def test_the_values_are_those_of_the_reference(metric):
    cases = REFERENCE_VALUES[metric]["cases"]
    metric_values = values(metric, cases)
    scores = answer_scores(metric, metric_values)
    if "score" in cases[0]:
        expected = [case["score"] for case in cases]
        assert [float(score) for score in scores] == pytest.approx(expected, abs=1e-6)
    numbers = summarize(metric, metric_values)
    for name, expected in REFERENCE_VALUES[metric].get("numbers", {}).items():
        assert numbers[name].mean == pytest.approx(expected, abs=1e-6), name


def test_exact_match_compares_characters():
    match = METRICS["exact_match"].function
    assert match("a cat", ["dog", "a cat"])
    assert not match("a cat ", ["a cat"]) and not match("A cat", ["a cat"]) and not match("", ["a"])


@pytest.mark.parametrize("metric", of_answers(METRICS))
def test_the_best_answer_has_the_highest_score_and_an_empty_one_the_lowest(metric):
    right = {
        "pope": ["yes", "no"],
        "multiple_choice": ["B", "A"],
        "box_iou": ["[0, 0, 1, 1]", "[5, 5, 7, 8]"],
    }.get(metric, ["a red bus on the street", "two dogs play in the snow"])
    references = [Reference([text] * 4, "x") for text in right]
    low, high = {"bleu": (0, 100)}.get(metric, METRICS[metric].bounds)
    assert summarize(metric, evaluate_metric(metric, right, references))[metric].mean == (
        pytest.approx(high)
    )
    empty = summarize(metric, evaluate_metric(metric, ["", ""], references))[metric].mean
    # An answer without "no" is yes.
    assert empty == (0.5 if metric == "pope" else low)


def test_multiple_choice_never_guesses():
    pets = ["cat", "dog"]
    answers = ["", "none of them", "I do not know", "neither of these, as far as I know"]
    assert [choices.parse_choice(answer, "AB", pets) for answer in answers] == [None] * 4
    assert not any(choices.multiple_choice("?", [letter], pets) for letter in "AB")
    # Without the texts of the choices, letters are parsed alone.
    assert choices.multiple_choice("The answer is (H).", ["H"], [])
    assert not choices.multiple_choice("I think so", ["H"], [])


def test_captions_are_tokenized_as_by_stanfords_program():
    texts = {
        "A man's dog doesn't like (it)!": "a man 's dog does n't like -lrb- it -rrb-",
        "two-way street - it's $5.00/day": "two-way street it 's $ 5.00 / day",
        "at 12:30 p.m. in the U.S.A., 1,000 can't": "at 12:30 p.m. in the u.s.a. 1,000 ca n't",
        "a \u201cquoted\u201d word \u2013 Mr. Smith\u2019s": "a quoted word mr. smith 's",
        "": "",
    }
    for text, tokens in texts.items():
        assert " ".join(tokenize_caption(text)) == tokens


def test_the_counts_of_bleu_are_sacrebleus_for_any_text():
    """Repeated words, marks, numbers, entities and other spaces among them."""
    rng = random.Random(0)
    pieces = [*"aab.,-?!'&;<>()[]0123 \t\n\u00a0\u00e9", " a", " b", " the the ", "<skipped>"]
    pieces += ["&quot;", "&amp;", "-\n", " 1,000.5 ", " two-way ", "\x1c", "\u2019"]

    def text():
        return "".join(rng.choices(pieces, k=rng.randint(0, 12)))

    scorer = sacrebleu.BLEU(effective_order=True)
    for _ in range(1000):
        prediction, references = text(), [text() for _ in range(3)]
        score = scorer.sentence_score(prediction, references)
        expected = [*score.counts, score.sys_len, score.ref_len]
        assert captions.bleu(prediction, references) == expected


def test_the_texts_of_a_question_are_normalized_as_each_alone():
    """Marks at the end of and within words, numbers and null characters among them."""
    rng = random.Random(0)
    pieces = [*"abAN.,-/?!'s01 \t\n\0\u00a0\u00e9", " the ", " one ", " isnt ", "1,000", " 3.5 "]
    for _ in range(1000):
        texts = ["".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(4)]
        alone = [text.replace("\0", " ") for text in texts]
        expected = [vqa.replace_words(vqa.remove_punctuation(text)) for text in alone]
        assert vqa.normalize(join_texts(texts)) == expected
        rouge = [captions.rouge_l(texts[0], [text]) for text in alone]
        assert captions.rouge_l(texts[0], texts) == max(rouge)


@pytest.mark.parametrize(
    ("metric", "reference", "message"),
    [
        ("pope", Reference(["maybe"], "a.json: line 3"), "line 3: metric pope: .* yes or no"),
        ("pope", Reference(["yes", "no"], "x"), "yes or no"),
        ("vqa_accuracy", Reference(["red"], "x"), "several references, and there is only one"),
        ("text_vqa", Reference(["red"], "x"), "several references, and there is only one"),
        ("box_iou", Reference(["left"], "x"), "'left' has no box"),
        ("multiple_choice", Reference(["C"], "x", choices=["a", "b"]), "not a letter of A to B"),
        ("multiple_choice", Reference(["cat"], "x"), "'cat' is not a letter of A to H"),
        ("cider", Reference(["a cat"], "x"), "at least 2 questions"),
    ],
)
def test_references_that_do_not_fit_a_metric_are_refused(metric, reference, message):
    with pytest.raises(DataError, match=message):
        check_references([metric], [reference])


def test_an_unknown_or_repeated_metric_is_refused():
    with pytest.raises(ConfigError, match="'vqa_acc' is not a metric .*vqa_accuracy.* choose"):
        check_metrics(["vqa_acc"], "eval.metrics")
    with pytest.raises(ConfigError, match="names anls twice"):
        check_metrics(["anls", "anls"], "eval.metrics")
    with pytest.raises(ConfigError, match="eval.metrics is empty"):
        check_metrics([], "eval.metrics")


def test_a_missing_package_is_named_with_its_requirements(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_metrics(["vqa_accuracy"], "eval.metrics")
    with pytest.raises(ConfigError, match="bleu needs .* sacrebleu: pip install -r requirements-"):
        check_metrics(["bleu"], "eval.metrics")


def test_every_name_of_a_number_is_parsed():
    for name in score_names():
        assert metric_of(parse_score(name).metric) in METRICS
    assert parse_score("pope_f1_by_type.popular").type == "popular"
    assert metric_of("pope_f1") == "pope"
    assert parse_score("pope_f2") is None
    names = [name for metric in METRICS for name in number_names(metric)]
    keys = [key for name in names for key in set(metric_keys(name)) - {metric_keys(name).example}]
    assert len(keys) == len(set(keys)), "two numbers have one key"


def test_types_are_scored_alone_and_questions_without_type_are_in_no_group():
    predictions = ["yes", "no", "no", "yes"]
    labels = ["yes", "yes", "no", "no"]
    types = ["popular", "popular", "random", None]
    references = [Reference([label], "x", type) for label, type in zip(labels, types)]
    numbers = describe_numbers("pope", evaluate_metric("pope", predictions, references), references)
    assert numbers["pope"] == 0.5
    assert numbers["pope_by_type"] == {"popular": 0.5, "random": 1.0}
    assert numbers["pope_recall_by_type"] == {"popular": 0.5, "random": 0.0}
    low, high = numbers["pope_f1_by_type_intervals"]["popular"]
    assert 0 < low < numbers["pope_f1_by_type"]["popular"] < high < 1


def test_the_interval_of_zeros_and_ones_is_wilsons():
    """Wilson's (1927) interval of 3 of 5 and of 10 of 10."""
    estimate = intervals.estimate_mean([1, 1, 1, 0, 0])
    assert (estimate.low, estimate.high) == pytest.approx((0.230724, 0.882379), abs=1e-6)
    share = intervals.estimate_share(3, 5)
    assert (share.low, share.high) == pytest.approx((estimate.low, estimate.high))
    estimate = intervals.estimate_mean([True] * 10)
    assert (estimate.low, estimate.high) == pytest.approx((0.722467, 1.0), abs=1e-6)


def test_intervals_stay_within_the_bounds_and_cover_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        scores = 10 * rng.beta(0.2, 2.0, size=60)
        estimate = intervals.estimate_mean(scores, (0.0, 10.0))
        assert 0 <= estimate.low < estimate.mean < estimate.high <= 10
        covered += estimate.low <= 10 * 0.2 / 2.2 <= estimate.high
    assert covered / 400 == pytest.approx(0.95, abs=0.025)


def test_scores_without_spread_have_the_widest_interval():
    same, widest = intervals.estimate_mean([0.5] * 8), intervals.estimate_mean([0, 1] * 4)
    assert (same.low, same.high) == (widest.low, widest.high)
    assert intervals.estimate_share(0, 0) == intervals.Estimate(0.0, 0.0, 1.0)


def test_the_bootstrap_of_a_mean_is_about_wilsons_interval():
    scores = np.random.default_rng(0).integers(0, 2, 500)
    counts = np.stack([scores, np.ones_like(scores)], axis=1)
    resampled = intervals.estimate_of_sums(counts, lambda sums: sums[0] / sums[1])
    wilson = intervals.estimate_mean(scores)
    assert resampled.mean == wilson.mean
    assert (resampled.low, resampled.high) == pytest.approx((wilson.low, wilson.high), abs=0.01)


TIMED = ("exact_match", "contains", "vqa_accuracy", "text_vqa", "anls", "relaxed_accuracy")
TIMED += ("bleu", "rouge_l")


def test_ten_thousand_answers_take_a_second():
    rng = random.Random(0)
    words = [f"word{i}" for i in range(3000)]

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, 4)))

    predictions = [text() for _ in range(10_000)]
    references = [Reference([text() for _ in range(10)], "x") for _ in predictions]
    seconds = 0.0
    for metric in TIMED:
        start = time.process_time()
        summarize(metric, evaluate_metric(metric, predictions, references))
        seconds += time.process_time() - start
    # Three times the time of a machine without other load.
    assert seconds < 1.8
