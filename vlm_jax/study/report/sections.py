"""The page of a report: all sections in their order."""

from vlm_jax.study.planning import Plan
from vlm_jax.study.report import costs, curves, findings, samples, scores, statistics
from vlm_jax.study.report.findings import Finding
from vlm_jax.study.report.page import Page
from vlm_jax.study.report.results import Results
from vlm_jax.study.tuning import Sweep


def build_page(results: Results, file: str, sweep: Sweep | None = None) -> Page:
    """Returns the report of the finished runs.

    Args:
      file: of the study.
      sweep: in which its learning rates were chosen.
    """
    plan = results.plan
    study = plan.study
    pairs = {axis: statistics.pairs(results, axis) for axis in study.matched}
    found = findings.find(results)
    seeds = "1 seed" if study.seeds == 1 else f"{study.seeds} seeds"
    lead = [
        *quick_warning(plan),
        f"{len(study.arms)} arms, {seeds}, {len(plan.runs())} runs.",
        *_answers(results, found),
    ]
    sections = [
        findings.answer_section(results, found),
        scores.missing_section(results),
        costs.cost_section(results),
        *(scores.score_section(results, *pair) for pair in pairs.items()),
        scores.type_section(results),
        scores.probe_section(results),
        scores.prerequisite_section(results),
        curves.threshold_section(results),
        scores.curve_section(results),
        scores.layer_section(results),
        samples.sample_section(results),
        scores.sweep_section(results, sweep),
        scores.matching_section(results),
        costs.difference_section(results),
        costs.reproduction_section(results, file),
    ]
    title = f"{study.question} (quick)" if plan.quick else study.question
    return Page(title, lead, [section for section in sections if section])


def _answers(results: Results, found: list[Finding]) -> list[str]:
    """Returns a sentence for each contrast; for a study without any, about each axis."""
    study = results.plan.study
    if not study.contrasts:
        return [scores.summary(results, axis) for axis in study.matched]
    by_name = {finding.name: finding for finding in found}
    return [
        findings.describe(by_name[name]) if name in by_name else f"{name}: no run is done yet."
        for name in study.contrasts
    ]


def quick_warning(plan: Plan) -> list[str]:
    """Returns a paragraph for the report of a study run with --quick, else nothing."""
    if not plan.quick:
        return []
    settings = ", ".join(f"{name} {value}" for name, value in plan.study.quick.items())
    return [
        f"This is a quick study (--quick: {settings}). It shows that every run works; its scores "
        "do not answer the question, and its arms need not be matched."
    ]
