"""The contrasts of a study: their tests and verdicts, and the first section of its report."""

import dataclasses
import math
from collections.abc import Mapping
from statistics import fmean

from vlm_jax.infer.metrics.intervals import Bounds, Estimate
from vlm_jax.infer.metrics.scores import score_bounds
from vlm_jax.study.contrasts import Contrast, Term, parse_sum
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report import figures, statistics
from vlm_jax.study.report.page import Cell, Section, Table, number_cell
from vlm_jax.study.report.results import Results
from vlm_jax.study.report.scores import format_estimate, format_p
from vlm_jax.study.report.statistics import SIGNIFICANCE, Mean
from vlm_jax.study.report.versions import by_version, seed_groups, version_names
from vlm_jax.study.run.folder import Folder, as_stored

REPRODUCED, REVERSED, NOT_RESOLVED = "reproduced", "reversed", "not resolved"
TEXT = (
    "Only contrasts are tested, which a study names before any run. Intervals are 95 % over seeds, "
    "within the bounds of the metric. p values are corrected for the number of contrasts (Holm), "
    "intervals are not. Reproduced: p is below 0.05, and the difference has the published sign. "
    "Reversed: it has the other sign. Equality is claimed only if two one-sided tests place the "
    "difference within the margin (Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15), "
    "and reversed if it is beyond the margin."
)
PAIRED = "Arms of a seed share their pretrained parts, so that differences are taken seed by seed."
CHANGED = (
    "The contrasts were changed after the first run: they are exploration, not tests that were "
    "named beforehand."
)
UNPAIRED = "Arms of a seed share no trained part, so that they are independent samples (Welch)."


@dataclasses.dataclass(frozen=True)
class Finding:
    """A contrast with its test."""

    name: str
    contrast: Contrast
    axis: str
    bounds: Bounds
    total: Mean
    by_seed: Mapping[int, float]  # of the seeds that all arms have; {} without pairs
    p: float | None  # corrected; None: the seeds determine none

    @property
    def estimate(self) -> Estimate:
        return self.total.estimate(self.bounds)

    @property
    def verdict(self) -> str:
        if self.p is None or self.p >= SIGNIFICANCE:
            return NOT_RESOLVED
        margin = self.contrast.margin
        if margin is not None:
            return REPRODUCED if abs(self.total.mean) < margin else REVERSED
        is_as_published = (self.total.mean > 0) == (self.contrast.published == "> 0")
        return REPRODUCED if is_as_published else REVERSED

    @property
    def excluded(self) -> str:
        """The effects that the interval excludes, on the published side; "" without interval."""
        low, high = self.estimate.low, self.estimate.high
        if low is None:
            return ""
        if self.contrast.margin is not None:
            return f"differences beyond {max(-low, high):.3f}"
        return f"above {high:+.3f}" if self.contrast.published == "> 0" else f"below {low:+.3f}"


def find(results: Results) -> list[Finding]:
    """Tests the contrasts of a study that all arms have a run for.

    Raises:
      ConfigError: an evaluation has no such score.
    """
    study = results.plan.study
    tested = []
    for name, contrast in study.contrasts.items():
        axis = contrast.axis or next(iter(study.matched))
        terms = parse_sum(contrast.sum)
        samples = _samples(results, axis, terms)
        if not all(samples):
            continue
        bounds = _bounds(terms, study.metric)
        total = statistics.add(samples, study.shares_parts)
        by_seed = statistics.sums_by_seed(samples) if study.shares_parts else {}
        p = _p_value(total, contrast, bounds)
        tested.append(Finding(name, contrast, axis, bounds, total, by_seed, p))
    corrected = statistics.holm({finding.name: finding.p for finding in tested})
    return [dataclasses.replace(finding, p=corrected[finding.name]) for finding in tested]


def _samples(results: Results, axis: str, terms: list[Term]) -> list[dict[int, float]]:
    """Returns for each arm: seed -> sum of its terms. Scores of one run are not independent."""
    by_arm: dict[str, list[dict[int, float]]] = {}
    for term in terms:
        if (term.score, term.probe) == (None, None):
            scores = results.scores(axis, term.arm)
        else:
            name = term.score or results.plan.study.metric
            scores = results.other_scores(axis, term.arm, name, term.probe)
        sample = {seed: term.coefficient * score for seed, score in scores.items()}
        by_arm.setdefault(term.arm, []).append(sample)
    return [statistics.sums_by_seed(samples) for samples in by_arm.values()]


def _bounds(terms: list[Term], metric: str) -> Bounds:
    """Returns the lowest and the highest possible sum; none if a score has no upper bound."""
    low = high = 0.0
    for coefficient, _, score, _ in terms:
        ends = score_bounds(score or metric)
        if not all(map(math.isfinite, ends)):
            return -math.inf, math.inf
        scaled = sorted(coefficient * end for end in ends)
        low, high = low + scaled[0], high + scaled[1]
    return low, high


def _p_value(total: Mean, contrast: Contrast, bounds: Bounds) -> float | None:
    """Returns the p value of the claim that the mean suggests: a sign, or equal or unequal.

    Of an equality, one of two claims is possible: the mean is within the margin or beyond.
    """
    margin = contrast.margin
    if margin is None:
        return total.p_unequal(0.0, bounds)
    if bounds[1] <= margin:
        return 0.0
    above_low = total.p_above(-margin, bounds)
    above_high = total.p_above(margin, bounds)
    if above_low is None or above_high is None:
        return None
    if abs(total.mean) < margin:
        return max(above_low, 1 - above_high)
    return 2 * min(above_high, 1 - above_low)


def describe(finding: Finding) -> str:
    """Returns the sentence about a contrast on top of the report."""
    contrast = finding.contrast
    number = format_estimate(finding.estimate, "+")
    text = f"{finding.name}: {finding.verdict}. {contrast.sum} is {number}"
    if finding.p is not None:
        text += f", p {format_p(finding.p)}"
    published = contrast.published
    if contrast.margin is not None:
        published += f" within {contrast.margin:g}"
    text += f"; published: {published} ({contrast.source})."
    if finding.verdict == NOT_RESOLVED:
        excluded = finding.excluded
        text += f" Excluded: {excluded}." if excluded else " More seeds are needed."
    return text


def answer_section(results: Results, findings: list[Finding]) -> Section | None:
    """Returns the figure and the table of the contrasts; None without any."""
    if not findings:
        return None
    rows = []
    for finding in findings:
        contrast = finding.contrast
        seeds = ", ".join(f"{value:+.3f}" for value in finding.by_seed.values()) or "-"
        margin = "-" if contrast.margin is None else f"{contrast.margin:g}"
        rows.append(
            [
                Cell(finding.name),
                Cell(f"{contrast.sum}, at matched {axis_label(finding.axis)}"),
                Cell(contrast.published),
                number_cell(margin),
                Cell(contrast.source),
                number_cell(format_estimate(finding.estimate, "+")),
                number_cell(format_p(finding.p)),
                Cell(finding.verdict),
                Cell(finding.excluded or "-"),
                number_cell(seeds),
            ]
        )
    columns = [
        "contrast",
        "sum of arms",
        "published",
        "margin",
        "source",
        "here",
        "p",
        "verdict",
        "excluded",
        "each seed",
    ]
    text = [TEXT, PAIRED if results.plan.study.shares_parts else UNPAIRED]
    named = Folder(results.plan.folder).contrasts()
    if named is not None and named != as_stored(results.plan.study.contrasts):
        text.insert(0, CHANGED)
    tables = [Table(columns, rows), *_version_tables(results, findings)]
    return Section("Answer", text, [_picture(results, findings)], tables)


def _version_tables(results: Results, findings: list[Finding]) -> list[Table]:
    """Returns for each prerequisite with several versions: contrast -> mean over the seeds of each.

    A difference that has another sign with another version is about the prerequisite.
    """
    tables = []
    for name, changes in version_names(results.plan).items():
        rows = []
        for finding in findings:
            cells = [Cell(finding.name)]
            for values in by_version(len(changes), finding.by_seed):
                cells.append(number_cell(f"{fmean(values):+.3f}" if values else "-"))
            rows.append(cells)
        caption = f"By version of the prerequisite {name}: means over its seeds"
        tables.append(Table(["contrast", *changes], rows, caption))
    return tables


def _picture(results: Results, findings: list[Finding]):
    rows = [
        figures.Row(
            f"{finding.name} ({finding.contrast.published})",
            finding.estimate,
            seed_groups(results.plan, finding.by_seed),
            finding.contrast.margin,
        )
        for finding in findings
    ]
    metric = results.plan.study.metric.replace("_", " ")
    return figures.contrast_picture(rows, f"difference in {metric}")
