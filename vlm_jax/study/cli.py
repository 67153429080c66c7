"""The command line of studies; a mistake is one sentence, exit code 2."""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from vlm_jax.cli.checkpoints import Parser
from vlm_jax.config import ConfigError, UserError
from vlm_jax.config.hints import nearest
from vlm_jax.study import definition, planning
from vlm_jax.study.definition import Study
from vlm_jax.study.planning import Plan, Run
from vlm_jax.study.report import (
    costs,
    page,
    results,
    sections,
)
from vlm_jax.study.run import preparing, record, running
from vlm_jax.study.run.folder import Folder, default_folder

USAGE = """usage: python experiments/study.py VERB ...

  run FILE      trains and evaluates every arm with every seed; the same command goes on where it stopped
      --seeds N       instead of the study's own number     --jobs N        runs at a time (default 1)
      --arms A,B      these alone                           --shard 2/8     the second of eight shares of the runs
      --quick         a few steps, one seed, in a folder of its own: shows that everything works; of costs, only
                      those of the reference are measured
      --folder DIR    where the study is kept (default runs/studies/NAME)
  report FILE   writes report.md of what there is [--to DIR] [--folder DIR] [--quick]
  list          the studies of experiments/: what they ask, their arms, and how many runs are done"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0; 1 where a run failed; 2 for a mistake of the user; 75 or 130 where SIGTERM or Ctrl-C stopped it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    jax.config.update(
        "jax_platforms", "cpu"
    )  # shapes alone are asked of it here: an accelerator is for the runs
    try:
        verb, *rest = arguments
        if verb not in VERBS:
            raise ConfigError(
                f"{verb!r} is no verb{nearest(verb, VERBS)}: choose {', '.join(VERBS)}."
            )
        return VERBS[verb](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except running.Stopped as error:
        print(error, file=sys.stderr)
        return error.exit_code


def options(verb: str, arguments: list[str], *names: str) -> argparse.Namespace:
    """The options of a verb about one study.

    Raises:
      ConfigError: one that it does not have, or a value that cannot be.
    """
    parser = Parser(prog=f"python experiments/study.py {verb}")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    settings = {"seeds": {"type": int}, "jobs": {"type": int, "default": 1}, "to": {"type": Path}}
    for name in names:
        parser.add_argument(f"--{name}", **settings.get(name, {}))
    given = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        number = getattr(given, name, None)
        if number is not None and number < 1:
            raise ConfigError(f"--{name} is {number}: it must be at least 1.")
    given.command = shlex.join(["python", "experiments/study.py", verb, *arguments])
    given.folder = given.folder or default_folder(given.file, given.quick)
    return given


def run(arguments: list[str]) -> int:
    given = options("run", arguments, "seeds", "jobs", "arms", "shard")
    study = asked(given)
    chosen, share = _chosen_arms(given.arms, study), _share(given.shard)
    with running.stoppable():
        return _run(
            given,
            study,
            lambda runs: planning.share([one for one in runs if one.arm in chosen], *share),
        )


def asked(given: argparse.Namespace) -> Study:
    """The study of the file, with as many seeds as were asked for."""
    study = definition.load(given.file)
    seeds = getattr(given, "seeds", None) or (
        definition.QUICK_SEEDS if given.quick else study.seeds
    )
    return replace(study, seeds=seeds)


def _run(given: argparse.Namespace, study: Study, choose: Callable[[list[Run]], list[Run]]) -> int:
    place = Folder(given.folder)
    if "seconds" in study.matched:
        with place.alone():
            preparing.measure(place, planning.own(study, given.folder, given.quick))
    plan = planning.plan(study, given.folder, given.quick, preparing.step_seconds(place, study))
    place.open(plan, given.command)
    runs = choose(plan.runs())
    with place.alone():
        for name, cfg in plan.first.items():
            preparing.train_first(name, cfg, planning.export_folder(given.folder, name))
        wanted = {
            plan.model_name(one.axis, one.arm)
            for one in runs
            if not given.quick or one.arm == study.reference
        }
        preparing.measure(
            place, {name: cfg for name, cfg in plan.models().items() if name in wanted}
        )
    queue = running.Queue(runs, {one: _expected_seconds(place, plan, one) for one in runs})
    queue.work(given.jobs)
    print(f"{costs.command('report', given.file, plan)} writes a report of the runs that are done")
    return int(bool(queue.failed))


def _expected_seconds(place: Folder, plan: Plan, one: Run) -> float:
    """Of its steps alone, which is enough to compare runs; a step is taken for a second where it was not measured."""
    measured = place.read_measurement(plan.model_name(one.axis, one.arm)) or {"step_seconds": 1.0}
    return one.cfg.train.steps * measured["step_seconds"]


def _chosen_arms(given: str | None, study: Study) -> list[str]:
    chosen = given.split(",") if given is not None else list(study.arms)
    for name in chosen:
        if name not in study.arms:
            raise ConfigError(
                f"--arms {name!r} is no arm{nearest(name, study.arms)}: choose {', '.join(study.arms)}."
            )
    return chosen


def _share(given: str | None) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    number, _, count = (given or "1/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard {given} is no share: 2/8 is the second of eight.")
    return int(number), int(count)


def report(arguments: list[str]) -> int:
    given = options("report", arguments, "to")
    place = Folder(given.folder)
    if not place.definition.exists():
        raise ConfigError(
            f"folder {place.path} holds no study: run it first, or name its --folder."
        )
    study = asked(given)
    study = replace(study, seeds=max(study.seeds, place.seeds()))
    plan = planning.plan(study, given.folder, given.quick, preparing.step_seconds(place, study))
    place.check(plan)
    found = results.read(plan)
    to = given.to or given.folder / "report"
    page.write(sections.page(found, given.file), to)
    whole = len(plan.runs()) - len(found.missing) - len(found.broken)
    print(f"{whole} of {len(plan.runs())} runs are done: {to}/report.html, report.md")
    if found.broken:
        raise ConfigError(
            "the report is without these runs; remove the folder of each, and run it again.\n  "
            + "\n  ".join(f"{name}: {why}" for name, why in found.broken.items())
        )
    return 0


def show(arguments: list[str]) -> int:
    if arguments:
        raise ConfigError(f"list takes nothing, not {arguments[0]}.")
    for file in definition.files(record.ROOT / "experiments"):
        try:
            _show(options("list", [str(file)]))
        except UserError as error:
            print(f"{file.name}: {error}")
    return 0


def _show(given: argparse.Namespace) -> None:
    study, place = asked(given), Folder(given.folder)
    print(f"{Path(given.file).name}: {study.question}\n  arms {', '.join(study.arms)}")
    runs = planning.plan(study, given.folder, False, preparing.step_seconds(place, study)).runs()
    print(f"  {sum(map(running.is_done, runs))} of {len(runs)} runs are done in {given.folder}")


VERBS: dict[str, Callable[[list[str]], int]] = {"run": run, "report": report, "list": show}
