"""All that a report says, in its order."""

from vlm_jax.study.planning import Plan
from vlm_jax.study.report import (
    costs,
    samples,
    scores,
    statistics,
)
from vlm_jax.study.report.page import Page
from vlm_jax.study.report.results import Results


def page(results: Results, file: str) -> Page:
    """The report of what there is; `file` is that of the study."""
    study = results.plan.study
    pairs = {axis: statistics.pairs(results, axis) for axis in study.matched}
    lead = [
        *quick_warning(results.plan),
        f"{len(study.arms)} arms, {study.seeds} seed{'s' * (study.seeds > 1)}, {len(results.plan.runs())} runs.",
        *(scores.summary(results, *pair) for pair in pairs.items()),
    ]
    sections = [
        scores.missing_section(results),
        *(scores.score_section(results, *pair) for pair in pairs.items()),
        scores.first_section(results),
        scores.curve_section(results),
        costs.cost_section(results),
        scores.type_section(results),
        samples.sample_section(results),
        scores.matching_section(results),
        costs.difference_section(results),
        costs.reproduction_section(results, file),
    ]
    title = f"{study.question} (quick)" if results.plan.quick else study.question
    return Page(title, lead, [section for section in sections if section])


def quick_warning(plan: Plan) -> list[str]:
    """A paragraph for the report of a study that was run with --quick."""
    if not plan.quick:
        return []
    settings = ", ".join(f"{name} {value}" for name, value in plan.study.quick.items())
    return [
        f"This is a quick study (--quick: {settings}). It shows that every run works; its scores do not answer the "
        "question, and its arms need not be matched."
    ]
