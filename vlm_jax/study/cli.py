"""Command line of studies. A user's mistake prints one sentence and exits with code 2."""

import argparse
import functools
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from vlm_jax.cli.options import Parser
from vlm_jax.config import ConfigError, UserError
from vlm_jax.config.hints import nearest
from vlm_jax.runtime.workdir import write_atomic
from vlm_jax.study import definition, planning, tuning
from vlm_jax.study.definition import Study
from vlm_jax.study.planning import Plan, Run
from vlm_jax.study.report import costs, page, results, sections
from vlm_jax.study.run import preparing, record, running
from vlm_jax.study.run.folder import Folder, default_folder
from vlm_jax.study.tuning import SEPARATOR, Sweep

USAGE = """usage: python experiments/study.py COMMAND ...

  run FILE        train and evaluate every arm with every seed; the same command resumes. FILE may
                  be the name of a study of experiments/, or of a group of them (see list)
    --quick         a few steps and one seed, in a separate folder: does it work?
    --seeds N       number of seeds (default: the study's)
    --jobs N        runs at a time (default 1)
    --arms A,B      only these arms
    --shard 2/8     only the second of eight shards of the runs
    --folder DIR    folder of the study (default runs/studies/NAME)
  tune FILE       train the candidates of `tune` on the validation split, and write the rates that
                  the study takes to rates/NAME.json beside FILE
    --quick, --jobs N, --folder DIR
  report FILE     write report.html and report.md of the finished runs
    --to DIR        folder of the report (default: report/ in the study's folder)
    --folder DIR, --quick
  list            print the studies of experiments/, their arms and finished runs, and the groups

examples:
  python experiments/study.py run flip --quick
  python experiments/study.py run core --jobs 2
  python experiments/study.py report experiments/flip.py --to out"""

# Name -> files of experiments/ that `run` runs one after the other.
GROUPS = {"core": ("cost", "flip", "retention")}
# Those that train nothing, and print their report.
SCRIPTS = ("cost",)
OPTIONS_OF_ONE_STUDY = ("--folder", "--arms")
NAME = re.compile(r"\w+")
INTEGER_OPTIONS = ("seeds", "jobs")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0: success; 1: a run failed; 2: a user's mistake; 75: stopped by SIGTERM; 130: by Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    # This process only traces shapes; an accelerator is left to the runs.
    jax.config.update("jax_platforms", "cpu")
    try:
        name, *rest = arguments
        if name not in COMMANDS:
            raise ConfigError(
                f"command {name!r} does not exist{nearest(name, COMMANDS)}: "
                f"choose {', '.join(COMMANDS)}."
            )
        return COMMANDS[name](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except running.Stopped as error:
        print(error, file=sys.stderr)
        return error.exit_code


def parse_options(
    command: str, arguments: list[str], *options: str, name: str = ""
) -> argparse.Namespace:
    """Returns the options of a command for one study.

    Args:
      options: those it has beside the common ones.
      name: of the default folder, after the study's name.

    Raises:
      ConfigError: an option does not exist, or its value is invalid.
    """
    parser = Parser(prog=f"python experiments/study.py {command}")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    settings = {"seeds": {"type": int}, "jobs": {"type": int, "default": 1}, "to": {"type": Path}}
    for option in options:
        parser.add_argument(f"--{option}", **settings.get(option, {}))
    args = parser.parse_args(arguments)
    for option in INTEGER_OPTIONS:
        number = getattr(args, option, None)
        if number is not None and number < 1:
            raise ConfigError(f"--{option} is {number}, but must be at least 1.")
    args.command = shlex.join(["python", "experiments/study.py", command, *arguments])
    args.file = find_file(args.file)
    args.folder = args.folder or default_folder(args.file, args.quick, name)
    return args


def find_file(name: str) -> str:
    """Returns the file of a study: a path, or the name of a file of experiments/ without .py."""
    file = record.ROOT / "experiments" / f"{name}.py"
    if not NAME.fullmatch(name) or not file.exists():
        return name
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def load_study(options: argparse.Namespace) -> Study:
    """Returns the study of the file, with its tuned rates and the options' number of seeds."""
    study = definition.load(options.file)
    study = tuning.apply(study, tuning.read(options.file))
    seeds = definition.QUICK_SEEDS if options.quick else study.seeds
    return replace(study, seeds=getattr(options, "seeds", None) or seeds)


def run(arguments: list[str]) -> int:
    """Trains and evaluates the runs that are not done, of a study or of a group."""
    if arguments and arguments[0] in GROUPS:
        return _run_group(*arguments)
    return _prepare_run(arguments)()


def _run_group(name: str, *options: str) -> int:
    for option in options:
        if option.partition("=")[0] in OPTIONS_OF_ONE_STUDY:
            raise ConfigError(
                f"{option} is an option of one study, but {name} is the group "
                f"{', '.join(GROUPS[name])}: run one of them."
            )
    # A mistake in the last study is found before the first runs.
    runs = [_prepare_run([member, *options]) for member in GROUPS[name]]
    return max(run_member() for run_member in runs)


def _prepare_run(arguments: list[str]) -> Callable[[], int]:
    """Returns a function that runs a file, after the checks of its options."""
    options = parse_options("run", arguments, "seeds", "jobs", "arms", "shard")
    if options.file in map(find_file, SCRIPTS):
        return functools.partial(_run_script, options)
    study = load_study(options)
    if study.tune and not options.quick and tuning.read(options.file) is None:
        raise ConfigError(
            f"{tuning.rates_file(options.file)} does not exist: choose the rates first, with "
            f"python experiments/study.py tune {options.file}."
        )
    arms = _parse_arms(options.arms, study)
    index, count = _parse_shard(options.shard)

    def select(runs: list[Run]) -> list[Run]:
        return planning.shard([run for run in runs if run.arm in arms], index, count)

    def run_study() -> int:
        with running.stop_on_signals():
            return _run(options, study, select)

    return run_study


def _run_script(options: argparse.Namespace) -> int:
    """Writes what a script prints to report.md of its folder."""
    report_file = options.folder / "report.md"
    report_file.parent.mkdir(parents=True, exist_ok=True)
    report_file.unlink(missing_ok=True)
    with running.stop_on_signals():
        code = running.call([sys.executable, options.file], report_file)
    print(f"{options.file} {'failed, see' if code else 'wrote'} {report_file}", flush=True)
    return 1 if code else 0


def _run(
    options: argparse.Namespace, study: Study, select: Callable[[list[Run]], list[Run]]
) -> int:
    folder = Folder(options.folder)
    # Steps of matched seconds depend on measured speeds, so these come before the plan.
    if "seconds" in study.matched:
        with folder.locked():
            arms = planning.unmatched_arms(study, options.quick)
            preparing.measure_models(folder, arms)
    step_seconds = preparing.read_step_seconds(folder, study)
    plan = planning.build_plan(study, options.folder, options.quick, step_seconds)
    folder.open(plan, options.command)

    runs = select(plan.runs())
    with folder.locked():
        first = plan.prerequisites_of(runs)
        preparing.reuse_finished(folder, first)
        # Those that fail are printed; the runs that start from them will fail too.
        running.Queue(first, {run: run.cfg.train.steps for run in first}).work(options.jobs)
        preparing.measure_models(folder, _models_to_measure(plan, runs))

    expected_seconds = {run: _expected_seconds(folder, plan, run) for run in runs}
    queue = running.Queue(runs, expected_seconds)
    queue.work(options.jobs)
    report_command = costs.study_command("report", options.file, plan)
    print(f"{report_command} writes a report of the finished runs")
    return 1 if queue.failed else 0


def tune(arguments: list[str]) -> int:
    """Trains the candidates of every arm, and writes their scores on the validation split."""
    options = parse_options("tune", arguments, "jobs", name="tune")
    study = definition.load(options.file)
    if not study.tune:
        raise ConfigError(f"study {options.file} has no tune: name candidates of its arms.")
    folder = Folder(options.folder)
    plan = planning.build_plan(tuning.sweep_study(study), options.folder, options.quick, {})
    folder.open(plan, options.command)
    runs = plan.runs()
    with running.stop_on_signals(), folder.locked():
        first = plan.prerequisites_of(runs)
        preparing.reuse_finished(folder, first)
        for group in (first, runs):
            queue = running.Queue(group, {run: run.cfg.train.steps for run in group})
            queue.work(options.jobs)

    sweep = _read_sweep(options, study, results.read_results(plan))
    for arm, candidates in sweep.arms.items():
        chosen = sweep.best(study, arm)
        for i, (overrides, score) in enumerate(candidates):
            mark = "  chosen" if i == chosen else ""
            score_text = "failed" if score is None else f"{score:.4f}"
            print(f"{arm}: {study.metric} {score_text} with {dict(overrides)}{mark}")
    if options.quick:
        print("a quick sweep chooses nothing: no file is written")
        return 1 if queue.failed else 0
    file = tuning.rates_file(options.file)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, tuning.as_text(sweep))
    print(f"{file} is written: commit it before the study is run")
    return 1 if queue.failed else 0


def _read_sweep(options: argparse.Namespace, study: Study, found: results.Results) -> Sweep:
    (axis,) = found.plan.study.matched
    arms = {}
    for arm, candidates in study.tune.items():
        scores = [found.scores(axis, f"{arm}{SEPARATOR}{i}").get(0) for i in range(len(candidates))]
        arms[arm] = list(zip(candidates, scores))
    return Sweep(study.metric, arms, time.strftime("%Y-%m-%d"), options.command)


def _models_to_measure(plan: Plan, runs: list[Run]) -> dict:
    """Returns the models of the runs; for a quick study only the model of the reference."""
    models = {}
    for run in runs:
        if not plan.quick or run.arm == plan.study.reference:
            models.setdefault(plan.model_name(run.axis, run.arm), run.cfg)
    return models


def _expected_seconds(folder: Folder, plan: Plan, run: Run) -> float:
    """Returns the seconds of the training steps; without a measurement, a step counts as 1 s."""
    measurement = folder.read_measurement(plan.model_name(run.axis, run.arm))
    step_seconds = measurement["step_seconds"] if measurement else 1.0
    return run.cfg.train.steps * step_seconds


def _parse_arms(option: str | None, study: Study) -> list[str]:
    """'a,b' -> ['a', 'b']"""
    if option is None:
        return list(study.arms)
    names = option.split(",")
    for name in names:
        if name not in study.arms:
            raise ConfigError(
                f"--arms {name!r} is not an arm{nearest(name, study.arms)}: "
                f"choose {', '.join(study.arms)}."
            )
    return names


def _parse_shard(option: str | None) -> tuple[int, int]:
    """'2/8' -> (2, 8)"""
    index, _, count = (option or "1/1").partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--shard {option} is invalid: 2/8 is the second of eight shards.")
    return int(index), int(count)


def report(arguments: list[str]) -> int:
    """Writes the report of the finished runs."""
    options = parse_options("report", arguments, "to")
    folder = Folder(options.folder)
    if not folder.definition.exists():
        raise ConfigError(
            f"folder {folder.path} holds no study: run it first, or name its --folder."
        )
    study = load_study(options)
    study = replace(study, seeds=max(study.seeds, folder.seeds()))
    step_seconds = preparing.read_step_seconds(folder, study)
    plan = planning.build_plan(study, options.folder, options.quick, step_seconds)
    folder.check(plan)

    study_results = results.read_results(plan)
    to = options.to or options.folder / "report"
    sweep = tuning.read(options.file) if study.tune else None
    page.write(sections.build_page(study_results, options.file, sweep), to)
    count = len(plan.runs())
    done = count - len(study_results.missing) - len(study_results.broken)
    print(f"{done} of {count} runs are done: {to}/report.html, report.md")
    if study_results.broken:
        raise ConfigError(
            "the report is without these runs; remove the folder of each, and run it again.\n  "
            + "\n  ".join(f"{name}: {reason}" for name, reason in study_results.broken.items())
        )
    return 0


def list_studies(arguments: list[str]) -> int:
    """Prints the studies of experiments/, and the groups."""
    if arguments:
        raise ConfigError(f"list has no argument {arguments[0]}.")
    for file in definition.study_files(record.ROOT / "experiments"):
        try:
            _print_study(parse_options("list", [str(file)]))
        except UserError as error:
            print(f"{file.name}: {error}")
    for name, members in GROUPS.items():
        print(f"group {name}: {', '.join(members)}")
    return 0


def _print_study(options: argparse.Namespace) -> None:
    study = load_study(options)
    step_seconds = preparing.read_step_seconds(Folder(options.folder), study)
    runs = planning.build_plan(study, options.folder, False, step_seconds).runs()
    done = sum(map(running.is_done, runs))
    print(f"{Path(options.file).name}: {study.question}\n  arms {', '.join(study.arms)}")
    print(f"  {done} of {len(runs)} runs are done in {options.folder}")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "tune": tune,
    "report": report,
    "list": list_studies,
}
