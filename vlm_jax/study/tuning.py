"""Learning rates of the arms, chosen in a sweep on the validation split.

`study.py tune` trains the candidates of every arm with one seed, which no run of the study has, and
writes their scores to `rates/NAME.json` beside the study's file. That file is committed: the study
takes the best candidate of each arm from it, and its report shows all of them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_jax.config import ConfigError
from vlm_jax.study.changes import Overrides, override
from vlm_jax.study.definition import SPLIT_OF_CHOICES, Study

# Seed of the sweep, beyond the seeds of a study.
SEED = 1000
# Name of a candidate's arm in the sweep: the arm, and the number of the candidate.
SEPARATOR = "+"


@dataclass(frozen=True)
class Sweep:
    """Scores of the candidates of every arm."""

    metric: str
    # Arm -> (overrides, score) of each candidate; no score: it failed.
    arms: Mapping[str, Sequence[tuple[Overrides, float | None]]]
    date: str = ""
    command: str = ""

    def best(self, study: Study, arm: str) -> int:
        """Returns the index of the best candidate of an arm.

        Raises:
          ConfigError: none has a score.
        """
        scores = {i: score for i, (_, score) in enumerate(self.arms[arm]) if score is not None}
        if not scores:
            raise ConfigError(f"no candidate of arm {arm} has a score: run tune again.")
        choose = max if study.higher_is_better else min
        return choose(scores, key=lambda i: scores[i])


def rates_file(file: str) -> Path:
    """Returns the file with the sweep of a study's file."""
    path = Path(file)
    return path.parent / "rates" / f"{path.stem}.json"


def sweep_study(study: Study) -> Study:
    """Returns the sweep as a study: an arm for each candidate, on the validation split."""
    arms = {}
    for arm, candidates in study.tune.items():
        for i, candidate in enumerate(candidates):
            arms[f"{arm}{SEPARATOR}{i}"] = {**study.arms[arm], **candidate}
    axis = next(iter(study.matched))
    return replace(
        study,
        question=f"Learning rates of: {study.question}",
        base=override(study.base, {"eval.split": SPLIT_OF_CHOICES, "seed": SEED}),
        arms=arms,
        matched={axis: study.matched[axis]},
        reference=next(iter(arms)),
        seeds=1,
        contrasts={},
        probes={},
        tune={},
    )


def read(file: str) -> Sweep | None:
    """Returns the committed sweep of a study's file; None without one.

    Raises:
      ConfigError: it is damaged.
    """
    path = rates_file(file)
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        arms = {
            arm: [(candidate["overrides"], candidate["score"]) for candidate in candidates]
            for arm, candidates in stored["arms"].items()
        }
        return Sweep(stored["metric"], arms, stored["date"], stored["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}): run tune again.") from None


def as_text(sweep: Sweep) -> str:
    """Returns the contents of the file of a sweep."""
    arms = {
        arm: [{"overrides": dict(overrides), "score": score} for overrides, score in candidates]
        for arm, candidates in sweep.arms.items()
    }
    values = {
        "date": sweep.date,
        "command": sweep.command,
        "split": SPLIT_OF_CHOICES,
        "seed": SEED,
        "metric": sweep.metric,
        "arms": arms,
    }
    return json.dumps(values, indent=1) + "\n"


def apply(study: Study, sweep: Sweep | None) -> Study:
    """Returns the study with the best candidate of every arm; without a sweep, with the first.

    Raises:
      ConfigError: the sweep had another metric or other candidates.
    """
    if not study.tune:
        return study
    arms = dict(study.arms)
    for arm, candidates in study.tune.items():
        chosen = 0
        if sweep is not None:
            _check(study, sweep, arm)
            chosen = sweep.best(study, arm)
        arms[arm] = {**arms[arm], **candidates[chosen]}
    return replace(study, arms=arms)


def _check(study: Study, sweep: Sweep, arm: str) -> None:
    swept = [dict(overrides) for overrides, _ in sweep.arms.get(arm, ())]
    if swept != [dict(candidate) for candidate in study.tune[arm]]:
        raise ConfigError(f"tune of arm {arm} had other candidates in the sweep: run tune again.")
    if sweep.metric != study.metric:
        raise ConfigError(f"the sweep is of {sweep.metric}, not {study.metric}: run tune again.")
