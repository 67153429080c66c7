"""Contrasts: sums of arms, verdicts, and equality by two one-sided tests."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from vlm_jax.config import ConfigError
from vlm_jax.study.contrasts import Contrast, Term, parse_sum
from vlm_jax.study.report import findings
from vlm_jax.study.report.results import Result, Results

NOISE = np.array([-0.02, 0.0, 0.01, -0.01, 0.02])


def results(scores, contrasts, shares_parts=True, metric="exact_match"):
    """Results of arms with a score for each seed; `count` is a type with 1 minus the score."""
    finished = {}
    for arm, arm_scores in scores.items():
        for seed, score in enumerate(arm_scores):
            stored = {metric: score, "by_type": {"count": 1 - score}}
            run = Result(score, 0.0, {}, (), (), {}, scores=stored)
            finished["examples", arm, seed] = run
    study = SimpleNamespace(
        contrasts=contrasts, matched={"examples": None}, metric=metric, shares_parts=shares_parts
    )
    return Results(SimpleNamespace(study=study), finished, {}, {})


def find(scores, *contrast, **settings):
    (finding,) = findings.find(results(scores, {"c": Contrast(*contrast)}, **settings))
    return finding


def arms(difference, scale=1.0):
    """Scores of two arms whose difference has this mean."""
    return {"a": 0.5 + difference + scale * NOISE, "b": np.full(5, 0.5)}


SUMS = {
    "a - b": [Term(1, "a"), Term(-1, "b")],
    "-a + b": [Term(1, "-a"), Term(1, "b")],
    "- a + b": [Term(-1, "a"), Term(1, "b")],
    "(a - b) - (c - d)": [Term(1, "a"), Term(-1, "b"), Term(-1, "c"), Term(1, "d")],
    "0.5 * (a + b) - c-1.0": [Term(0.5, "a"), Term(0.5, "b"), Term(-1, "c-1.0")],
    "a@by_type.count - b@text:nats": [Term(1, "a", "by_type.count"), Term(-1, "b", "nats", "text")],
}


@pytest.mark.parametrize(("text", "terms"), SUMS.items(), ids=SUMS)
def test_sums_of_arms_are_parsed(text, terms):
    assert parse_sum(text) == terms


@pytest.mark.parametrize("text", ["", "a b", "a -", "(a - b", "a - b)", "x * a", "2 *", "a + * b"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="is not a sum of arms"):
        parse_sum(text)


@pytest.mark.parametrize(
    ("difference", "published", "verdict"),
    [
        (0.1, "> 0", "reproduced"),
        (0.1, "< 0", "reversed"),
        (-0.1, "< 0", "reproduced"),
        (-0.1, "> 0", "reversed"),
        (0.005, "> 0", "not resolved"),
    ],
)
def test_a_verdict_is_about_the_published_sign(difference, published, verdict):
    assert find(arms(difference), "a - b", published, "a paper").verdict == verdict


def test_an_unresolved_contrast_names_the_effects_it_excludes():
    finding = find(arms(0.005), "a - b", "> 0", "a paper")
    assert finding.excluded == f"above {finding.estimate.high:+.3f}"
    assert f"Excluded: {finding.excluded}." in findings.describe(finding)
    assert find(arms(0.005), "a - b", "< 0", "a paper").excluded.startswith("below -")


def test_one_seed_resolves_nothing():
    finding = find({"a": [0.9], "b": [0.1]}, "a - b", "> 0", "a paper")
    assert (finding.verdict, finding.p, finding.excluded) == ("not resolved", None, "")
    assert "More seeds are needed." in findings.describe(finding)


@pytest.mark.parametrize(
    ("difference", "scale", "verdict"),
    [
        (0.01, 1.0, "reproduced"),
        (0.04, 1.0, "not resolved"),
        (0.0, 20.0, "not resolved"),
        (0.2, 1.0, "reversed"),
    ],
)
def test_equality_is_claimed_within_the_margin_alone(difference, scale, verdict):
    """A wide interval around 0 is not equality."""
    finding = find(arms(difference, scale), "a - b", "= 0", "a paper", 0.05)
    assert finding.verdict == verdict


def test_equality_is_two_one_sided_tests():
    """For a metric without an upper bound, each is a t test."""
    scores, margin = arms(0.01), 0.05
    finding = find(scores, "a - b", "= 0", "a paper", margin, metric="cider")
    unbounded = finding.total.p_above(-margin, (-np.inf, np.inf))
    differences = scores["a"] - scores["b"]
    expected = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    assert unbounded == pytest.approx(expected)
    assert finding.p < 0.05
    interval = finding.total.estimate(finding.bounds)
    assert -margin < interval.low and interval.high < margin


def test_an_interaction_is_a_sum_of_four_arms():
    scores = arms(0.1) | {"c": np.full(5, 0.5), "d": np.full(5, 0.4)}
    finding = find(scores, "(a - b) - (c - d)", "= 0", "a paper", 0.05)
    assert finding.total.mean == pytest.approx(0.0)
    assert finding.bounds == (-2.0, 2.0)


def test_scores_of_one_run_are_combined_before_they_are_averaged():
    """`count` is 1 minus the score, so that this sum is 2 in every run of each arm."""
    text = "a + a@by_type.count - b - b@by_type.count"
    finding = find(arms(0.1, 10.0), text, "> 0", "a paper", shares_parts=False)
    assert finding.total.mean == pytest.approx(0.0) and finding.total.error < 1e-12


def test_only_the_contrasts_share_the_correction():
    contrasts = {name: Contrast("a - b", "> 0", "a paper") for name in ("one", "two")}
    scores = arms(0.015)
    (alone,) = findings.find(results(scores, {"one": contrasts["one"]}))
    both = findings.find(results(scores, contrasts))
    assert [finding.p for finding in both] == pytest.approx([2 * alone.p] * 2)


def test_an_interval_of_a_contrast_respects_its_bounds():
    finding = find({"a": [1.0, 1.0, 0.7], "b": [0.0, 0.1, 0.0]}, "a - b", "> 0", "a paper")
    assert finding.estimate.low > 0 and finding.estimate.high <= 1


def test_a_contrast_without_runs_is_left_out():
    assert not findings.find(results({"a": [1.0]}, {"c": Contrast("a - b", "> 0", "a paper")}))
