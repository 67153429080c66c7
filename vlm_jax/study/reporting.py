"""All that a report says, in its order."""

from vlm_jax.study import costs, scores
from vlm_jax.study.page import Page
from vlm_jax.study.results import Results


def page(results: Results, file: str) -> Page:
    """The report of what there is; `file` is that of the study."""
    study = results.plan.study
    sections = [
        scores.missing_section(results),
        *(scores.score_section(results, axis) for axis in study.matched),
        costs.cost_section(results),
        scores.type_section(results),
        scores.matching_section(results),
        costs.difference_section(results),
        costs.reproduction_section(results, file),
    ]
    lead = [
        f"{len(study.arms)} arms, {study.seeds} seeds, {len(results.plan.runs())} runs; "
        f"compared at matched {' and at matched '.join(study.matched)}."
    ]
    return Page(study.question, lead, [section for section in sections if section])
