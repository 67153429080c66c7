"""The command line: verbs, and mistakes as one sentence with exit code 2."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from vlm_jax.cli import checkpoints
from vlm_jax.config import (
    ConfigError,
    Data,
    Eval,
    Experiment,
    Optim,
    RunError,
    Train,
    UserError,
    files,
)
from vlm_jax.config.hints import nearest, suggestion
from vlm_jax.config.validate import validate
from vlm_jax.runtime import preemption
from vlm_jax.runtime.process import exit_now
from vlm_jax.runtime.workdir import Workdir

USAGE = """usage: python run.py [VERB] [--config FILE] [--any.field VALUE ...]

  train     (the default) trains the experiment of --config in its work folder and evaluates it;
            with --workdir of a run that was stopped, continues it
  eval      --workdir W [--eval.split ...]: evaluates a run again, into W/eval/NAME
  generate  --workdir W [--image A.png ...] --prompt "..." ["..." ...]: asks every prompt about every image
  generate  --checkpoint DIR [--image A.png ...] --prompt "..." [--temperature T ...]: asks a public checkpoint
  verify    --checkpoint DIR --reference FILE.npz: compares a public checkpoint with a reference's outputs
  export    --checkpoint DIR_OR_WORKDIR --output DIR: writes a folder that transformers loads
  plan      --config FILE [--topology v5e:8x8 [--no-compile] | --devices N] [--json]: says what a step will cost, before
            any of it runs
  diff      A.py B.py: prints the fields in which two configs differ

python run.py VERB --config FILE --help lists every field with its value.

examples:
  python run.py --config configs/easy_vqa/unified.py
  python run.py --config configs/easy_vqa/unified.py --fusion.kind cross_attention --optim.learning_rate 5e-4 \\
      --workdir runs/mine
  python run.py eval --workdir runs/mine --eval.max_examples 500
  python run.py generate --workdir runs/mine --image a.png --prompt "what color is the shape?" "is there a circle?"
  python run.py generate --checkpoint checkpoints/llava-1.5-7b-hf --image a.jpg --prompt "what is this?"
  python run.py plan --config configs/tpu/llava_1_5_7b_stage_2.py --devices 64"""
COMMANDS_WITH_OWN_HELP = (
    "generate",
    "verify",
    "export",
)  # verbs that explain their options themselves
PLAN_OPTIONS = {
    "topology": {
        "help": "the slice of TPUs to plan for, CHIP:LAYOUT such as v5e:8x8; the step is compiled for it"
    },
    "no-compile": {
        "action": "store_true",
        "help": "with --topology: what is predicted for the slice, in seconds",
    },
    "devices": {
        "type": int,
        "help": "in the place of --topology: how many devices, of any kind (default: 1)",
    },
    "json": {"action": "store_true", "help": "the plan for machines"},
}
BEGINNINGS = ("--checkpoint", "--init_from", "--init-from")  # one option under several names
FINE_TUNING = Experiment(  # what --checkpoint begins with where there is no --config
    data=Data(source="conversations", augment=(), text_length=256),
    optim=Optim(learning_rate=2e-5, warmup_steps=30, weight_decay=0.0),
    train=Train(steps=1000, batch_size=16),
    eval=Eval(split="", batch_size=16, max_new_tokens=64),
)
EDITABLE_SECTIONS = (
    "data",
    "mesh",
    "distributed",
    "eval",
)  # sections that may change after the training


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0; 1 where a run failed; 2 for a mistake of the user; 75 where SIGTERM stopped a run that the same command
    continues; 130 for Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        has_verb = bool(arguments) and not arguments[0].startswith("-")
        verb, rest = (arguments[0], arguments[1:]) if has_verb else ("train", arguments)
        if not arguments or (verb not in COMMANDS_WITH_OWN_HELP and _asks_for_usage(rest)):
            print(USAGE)
            return 0 if arguments else 2
        if verb not in VERBS:
            hint = (
                suggestion([f"--config {verb}"]) if verb.endswith(".py") else nearest(verb, VERBS)
            )
            raise ConfigError(f"{verb!r} is not a verb{hint}: choose {', '.join(VERBS)}.")
        return VERBS[verb](rest)
    except (UserError, RunError, OSError, KeyboardInterrupt) as error:
        code, message = _failure(error)
        print(message, file=sys.stderr)
        return code


def _asks_for_usage(arguments: list[str]) -> bool:
    """Help is wanted, and there is no experiment whose fields could be listed."""
    named = any(argument.startswith(("--config", "--workdir")) for argument in arguments)
    return not named and bool({"-h", "--help"} & set(arguments))


def experiment(
    verb: str, arguments: list[str], stored: bool, options: dict[str, str] | None = None
) -> Experiment:
    """The experiment that the arguments ask for: of --config, or of the run in --workdir where `stored`.

    `options` as in `config_file.override`.
    """
    parser = checkpoints.Parser(add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    if not stored:
        parser.add_argument(*BEGINNINGS, dest="init_from", action=_Once)
    given, fields = parser.parse_known_args(arguments)
    empty = [name for name, value in vars(given).items() if value == ""]
    if empty:
        raise ConfigError(f"--{empty[0]} is empty.")
    if stored and (given.config or not given.workdir):
        raise ConfigError(
            f"{verb} needs --workdir W, the folder of a run, and no --config: the run has its own."
        )
    cfg = _base(verb, given)
    cfg = dataclasses.replace(cfg, workdir=given.workdir or cfg.workdir)
    if not stored and given.init_from:
        fields = [*fields, "--init_from", given.init_from]
    asked = files.override(cfg, fields, f"python run.py {verb}", options)
    if stored:
        _refuse_another_model(verb, cfg, asked)
    elif asked.begins_with_any and not _continues(given):
        from vlm_jax.hub import pretrained_parts

        explicit = files.explicit_fields(cfg, fields)
        asked = Workdir(asked.workdir).as_begun(
            pretrained_parts.resolve_checkpoints(asked, explicit), explicit
        )
    return validate(asked)


def _continues(given: argparse.Namespace) -> bool:
    """Whether the experiment is that of a run, which needs the folders that it began with no more."""
    return not given.config and bool(given.workdir) and Workdir(given.workdir).config.exists()


class _Once(argparse.Action):
    """An option of several names that is given once."""

    def __call__(self, parser, given, value, option_string=None):
        first = getattr(given, self.dest)
        if first is not None:
            raise ConfigError(
                f"--checkpoint and --init_from name one folder, not {first} and {value}: leave one out."
            )
        setattr(given, self.dest, value)


def _base(verb: str, given: argparse.Namespace) -> Experiment:
    """The experiment that the fields of the command line change: of --config, of the run in --workdir, or a new one."""
    begins = getattr(given, "init_from", None)
    if given.config:
        return files.load(given.config)
    if given.workdir and (_continues(given) or not begins):
        return Workdir(given.workdir).read_config()
    if not begins:
        raise ConfigError(f"{verb} needs --config FILE.")
    return dataclasses.replace(FINE_TUNING, workdir=f"runs/{Path(begins).name}")


def _refuse_another_model(verb: str, cfg: Experiment, asked: Experiment) -> None:
    """A run is asked as it was trained: the shapes of its parameters are those of its config."""
    changed = [
        line
        for line in files.differences(cfg, asked)
        if line.split(".")[0] not in EDITABLE_SECTIONS
    ]
    if changed:
        raise ConfigError(
            f"{verb} takes a run as it was trained, and only fields of {', '.join(EDITABLE_SECTIONS)} may be others: {changed[0]}."
        )


def train(arguments: list[str]) -> int:
    with preemption.handler(preemption.leave_at_once):
        cfg = experiment("train", arguments, stored=False)
        from vlm_jax.runtime import distributed
        from vlm_jax.train import loop

    try:
        with preemption.handler(preemption.stop_at_once):
            distributed.start(cfg)
            enable_compilation_cache(cfg)
            with _ending_together():
                loop.train(cfg)
                return _evaluate(cfg, is_later=False)
    except (RunError, preemption.Preempted) as error:
        preemption.ignore()
        code, message = _failure(error)
        print(message, file=sys.stderr)
        if not error.on_all_processes:
            exit_now(code)
        return code


def enable_compilation_cache(cfg: Experiment) -> None:
    """Programs are kept on disk, unless the environment says where, and the next start compiles none of them."""
    import jax

    if cfg.train.compilation_cache_dir and not jax.config.jax_compilation_cache_dir:
        jax.config.update(
            "jax_compilation_cache_dir", os.path.expanduser(cfg.train.compilation_cache_dir)
        )
        jax.config.update(
            "jax_persistent_cache_min_compile_time_secs", 0.1
        )  # a start compiles many small ones


def evaluate(arguments: list[str]) -> int:
    is_checkpoint = any(argument.split("=")[0] in BEGINNINGS for argument in arguments)
    cfg = _of_checkpoint(arguments) if is_checkpoint else experiment("eval", arguments, stored=True)
    from vlm_jax.runtime import distributed

    distributed.start(cfg)
    with _ending_together():
        return _evaluate(cfg, is_later=True)


def _of_checkpoint(arguments: list[str]) -> Experiment:
    """The experiment of `eval --checkpoint`: a checkpoint before any training, on conversations by default.

    Raises:
      ConfigError: the work folder holds a run, whose parameters and tokenizer are others.
    """
    cfg = experiment("eval", arguments, stored=False)
    if Workdir(cfg.workdir).config.exists():
        raise ConfigError(
            f"workdir {cfg.workdir} holds a run: choose another --workdir for the evaluation of --checkpoint "
            f"{cfg.init_from}, or leave out --checkpoint to evaluate the run."
        )
    data = cfg.data
    # Files have no other split than train, so the evaluation reads the same ones.
    if data.files and not cfg.eval.files:
        cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, files=data.files))
    return cfg


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """Ends all processes of a run where one of them fails alone: the others would wait for it."""
    from vlm_jax.runtime import distributed

    try:
        yield
        distributed.finish()
    except (Exception, KeyboardInterrupt) as error:
        if distributed.is_alone(error):
            preemption.ignore()
            distributed.leave_alone(*_failure(error))
        raise


def _failure(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and the message of an error; prints the traceback of an unexpected one."""
    match error:
        case UserError():
            return 2, f"error: {error}"
        case OSError() | RunError():  # OSError: such as a full disk; it names the file
            return 1, f"error: {error}"
        case preemption.Preempted():
            return preemption.RESUME_ME, str(error)
        case KeyboardInterrupt():
            return 130, "stopped"
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        reason = str(error).splitlines()[0]
        return (
            1,
            f"error: the run cannot go on ({reason}): where another process ended, its output says why.",
        )
    traceback.print_exception(error)
    return 1, f"error: {type(error).__name__}: {error}"


def _evaluate(cfg: Experiment, is_later: bool) -> int:
    """Evaluates the run's last checkpoint: into its work folder after the training, later into a folder of its own."""
    if not cfg.eval.read_split:
        print("eval.split is empty: nothing to evaluate")
        return 0
    from vlm_jax.data import pipeline
    from vlm_jax.infer import demo, evaluate

    folder = Workdir(cfg.workdir)
    load = demo.load_with_step if folder.config.exists() else demo.load_untrained
    params, tokenizer, step = load(cfg)
    if is_later:
        folder = folder.later_evaluation(cfg, step, pipeline.fingerprint(cfg.eval_data))
    scores = evaluate.evaluate(cfg, params, tokenizer, step, folder)
    print(
        f"exact match {scores['exact_match']:.4f} on {scores['examples']} questions of {cfg.eval.title}, "
        f"{scores['image_shuffled_exact_match']:.4f} with shuffled images\n"
        f"pictures: {folder.samples}   scores: {folder.eval}   every answer: {folder.predictions}"
    )
    return 0


def generate(arguments: list[str]) -> int:
    given = {argument.split("=")[0] for argument in arguments}
    if "--checkpoint" in given or (given & {"-h", "--help"} and "--workdir" not in given):
        return checkpoints.generate(arguments)
    if "--workdir" not in given:
        raise ConfigError(
            "generate needs --workdir W, the folder of a run, or --checkpoint DIR, a public checkpoint."
        )
    parser = checkpoints.Parser(add_help=False)
    parser.add_argument("--image", nargs="+", action="extend", default=[])
    parser.add_argument("--prompt", nargs="+", action="extend", default=[])
    given, rest = parser.parse_known_args(arguments)
    cfg = experiment("generate", rest, stored=True)
    always_has_image = cfg.fusion.has_images and not cfg.data.is_conversations
    if not given.prompt or (always_has_image and not given.image):
        raise ConfigError(
            'generate needs --image FILE [FILE ...] and --prompt "TEXT" ["TEXT" ...].'
        )
    from vlm_jax.infer import demo

    for parts in demo.ask(cfg, given.image, given.prompt):
        print("  ".join(parts))
    return 0


def plan(arguments: list[str]) -> int:
    parser = checkpoints.Parser(add_help=False)
    for name, settings in PLAN_OPTIONS.items():
        parser.add_argument(f"--{name}", **settings)
    given, rest = parser.parse_known_args(arguments)
    said = {name: settings["help"] for name, settings in PLAN_OPTIONS.items()}
    cfg = experiment("plan", rest, stored=False, options=said)
    _check_plan_options(given)
    from vlm_jax.plan import document, table

    made = document.make(cfg, given.topology, given.devices or 1, not given.no_compile)
    print(json.dumps(made, indent=1) if given.json else table.text(cfg, made))
    return 0


def _check_plan_options(given: argparse.Namespace) -> None:
    if given.devices is not None and given.devices < 1:
        raise ConfigError(f"--devices is {given.devices}: it must be at least 1.")
    if given.topology is None and given.no_compile:
        raise ConfigError(
            "--no-compile goes with --topology: name a slice, such as v5e:8x8, or leave it out."
        )
    if given.topology is not None and given.devices is not None:
        raise ConfigError(
            f"--topology {given.topology} says how many devices there are, and so does --devices {given.devices}: "
            "choose one of the two."
        )


def diff(arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise ConfigError("diff needs two config files: python run.py diff A.py B.py.")
    lines = files.differences(*map(files.load, arguments))
    print("\n".join(lines) if lines else "the two configs are equal")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "verify": checkpoints.verify,
    "export": checkpoints.export,
    "plan": plan,
    "diff": diff,
}
