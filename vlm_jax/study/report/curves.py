"""Learning curves of runs, and the time to a threshold."""

from collections.abc import Callable

import numpy as np

from vlm_jax.study import matching
from vlm_jax.study.matching import axis_label
from vlm_jax.study.report.page import Cell, Section, Table, number_cell
from vlm_jax.study.report.results import Result, Results

# A point of a curve is the mean of this share of the logged steps.
SMOOTHED_SHARE = 1 / 20

# A value for each logged step of a run.
Series = Callable[[Result], np.ndarray]


def column(result: Result, name: str) -> np.ndarray:
    return np.array([line[name] for line in result.metrics], float)


def seconds(result: Result) -> np.ndarray:
    """Returns seconds since the start of training, from the logged speed of each interval."""
    steps = column(result, "step")
    return np.cumsum(np.diff(steps, prepend=0) * column(result, "step_seconds"))


def smooth(values: np.ndarray) -> np.ndarray:
    """Returns the trailing mean over `SMOOTHED_SHARE` of the values."""
    width = max(1, round(len(values) * SMOOTHED_SHARE))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def first_below(result: Result, threshold: float) -> int | None:
    """Returns the index of the first logged step whose smoothed loss is below; None without any."""
    (below,) = np.nonzero(smooth(column(result, "loss")) < threshold)
    return int(below[0]) if below.size else None


def threshold_section(results: Results) -> Section | None:
    """Returns the time of each arm to the study's loss threshold; None without a threshold."""
    plan = results.plan
    threshold = plan.study.loss_threshold
    if threshold is None:
        return None
    rows = []
    for axis, arm in plan.arms:
        runs = list(results.by_seed(axis, arm).values())
        flops_per_step = matching.flops_per_step(plan.resolve(plan.arms[axis, arm]))
        steps, run_seconds = [], []
        for run in runs:
            index = first_below(run, threshold)
            if index is not None:
                steps.append(column(run, "step")[index])
                run_seconds.append(seconds(run)[index])
        cells = [Cell(axis_label(axis)), Cell(arm), number_cell(f"{len(steps)} of {len(runs)}")]
        pflops = [step * flops_per_step / 1e15 for step in steps]
        for values, decimals in ((steps, 0), (pflops, 3), (run_seconds, 0)):
            cells.append(number_cell(f"{np.mean(values):,.{decimals}f}" if values else "-"))
        rows.append(cells)
    text = (
        f"First logged step whose training loss, smoothed over a twentieth of the run, is below "
        f"{threshold:g} nats: means over the seeds that reach it."
    )
    columns = ["matched", "arm", "seeds", "steps", "training PFLOP", "seconds"]
    return Section("Time to a threshold", [text], tables=[Table(columns, rows)])
