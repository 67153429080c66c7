"""The experiment that a command line names: by a config file, a work folder or a checkpoint."""

import argparse
import dataclasses
from pathlib import Path

from vlm_jax.cli.options import FILE, FOLDER, Parser
from vlm_jax.config import ConfigError, Data, Eval, Experiment, Optim, Train, files
from vlm_jax.config.validate import validate
from vlm_jax.runtime.workdir import Workdir

# One option under several names.
INIT_OPTIONS = ("--checkpoint", "--init_from", "--init-from")
# The options that name an experiment, and their help.
OPTIONS = {
    "config": {"metavar": FILE, "help": "Python file that defines an experiment"},
    "workdir": {
        "metavar": FOLDER,
        "help": "work folder of the run; without --config and --checkpoint, of an existing run",
    },
    "checkpoint": {
        "metavar": FOLDER,
        "help": "public checkpoint or run to start from; --init_from is the same option",
    },
}
USAGE = "[OPTIONS] [--section.field VALUE ...]"
# Sections that may change after the training.
EDITABLE_SECTIONS = ("data", "mesh", "distributed", "eval")
# What --checkpoint starts from without a --config.
FINE_TUNING = Experiment(
    data=Data(source="conversations", augment=(), text_length=256),
    optim=Optim(learning_rate=2e-5, warmup_steps=30, weight_decay=0.0),
    train=Train(steps=1000, batch_size=16),
    eval=Eval(split="", batch_size=16, max_new_tokens=64),
)


def parse_experiment(
    command: str, arguments: list[str], stored: bool, options: dict[str, str] | None = None
) -> Experiment:
    """Returns the experiment of --config, or of the run in --workdir, with changed fields.

    Args:
      stored: requires the run in --workdir.
      options: as in `config.files.override`.

    Raises:
      ConfigError: no experiment is named, a field is unknown, invalid, or fixed by the run, or a
        metric does not exist.
    """
    parser = Parser(add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    if not stored:
        parser.add_argument(*INIT_OPTIONS, dest="init_from", action=_Once)
    args, fields = parser.parse_known_args(arguments)
    empty = [name for name, value in vars(args).items() if value == ""]
    if empty:
        raise ConfigError(f"--{empty[0]} is empty.")
    if stored and (args.config or not args.workdir):
        raise ConfigError(
            f"{command} needs --workdir W, the folder of a run, and no --config: the run has its "
            "own."
        )
    base = _load_base(command, args)
    base = dataclasses.replace(base, workdir=args.workdir or base.workdir)
    if not stored and args.init_from:
        fields = [*fields, "--init_from", args.init_from]
    cfg = files.override(base, fields, f"python run.py {command}", options)
    if stored:
        _refuse_another_model(command, base, cfg)
    elif cfg.begins_with_any and not _continues_run(args):
        import jax

        from vlm_jax import axes
        from vlm_jax.hub import pretrained_parts

        explicit = files.explicit_fields(base, fields)
        # The processes of a run are not connected yet: no device may be used before.
        with jax.sharding.use_abstract_mesh(axes.ABSTRACT_CPU):
            resolved = pretrained_parts.resolve_checkpoints(cfg, explicit, command == "eval")
        cfg = Workdir(cfg.workdir).as_begun(resolved, explicit)
    # They import NumPy, which the help of a command should not wait for.
    from vlm_jax.infer.metrics.scores import check_attention, check_best_metric
    from vlm_jax.infer.metrics.table import check_metrics

    check_metrics(cfg.eval.metrics, "eval.metrics")
    check_attention(cfg)
    # A finished run may be evaluated by other metrics.
    if not stored:
        check_best_metric(cfg)
    return validate(cfg)


def names_experiment(arguments: list[str]) -> bool:
    """Returns whether the arguments name an experiment, whose fields --help can list."""
    names = {f"--{name}" for name in OPTIONS}.union(INIT_OPTIONS)
    return any(argument.partition("=")[0] in names for argument in arguments)


def is_checkpoint(arguments: list[str]) -> bool:
    """Returns whether the arguments name a public checkpoint to start from."""
    return any(argument.split("=")[0] in INIT_OPTIONS for argument in arguments)


def parse_checkpoint_evaluation(arguments: list[str]) -> Experiment:
    """Returns the experiment of `eval --checkpoint`: a checkpoint before any training.

    Raises:
      ConfigError: the work folder holds a run, with other parameters and another tokenizer.
    """
    cfg = parse_experiment("eval", arguments, stored=False)
    if Workdir(cfg.workdir).config.exists():
        raise ConfigError(
            f"workdir {cfg.workdir} holds a run: choose another --workdir for the evaluation of "
            f"--checkpoint {cfg.init_from}, or leave out --checkpoint to evaluate the run."
        )
    # Files have no other split than train, so the evaluation reads the same ones.
    if cfg.data.files and not cfg.eval.files and not cfg.data.mixture:
        cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, files=cfg.data.files))
    return cfg


class _Once(argparse.Action):
    """An option of several names that may be given once."""

    def __call__(self, parser, args, value, option_string=None):
        first = getattr(args, self.dest)
        if first is not None:
            raise ConfigError(
                f"--checkpoint and --init_from name one folder, not {first} and {value}: leave one "
                "out."
            )
        setattr(args, self.dest, value)


def _load_base(command: str, args: argparse.Namespace) -> Experiment:
    """Returns the experiment before the fields of the command line are applied."""
    init_from = getattr(args, "init_from", None)
    if args.config:
        return files.load(args.config)
    if args.workdir and (_continues_run(args) or not init_from):
        return Workdir(args.workdir).read_config()
    if not init_from:
        raise ConfigError(f"{command} needs --config FILE.")
    return dataclasses.replace(FINE_TUNING, workdir=f"runs/{Path(init_from).name}")


def _continues_run(args: argparse.Namespace) -> bool:
    """Returns whether a run is continued, which no longer needs the folders it started from."""
    return not args.config and bool(args.workdir) and Workdir(args.workdir).config.exists()


def _refuse_another_model(command: str, stored: Experiment, cfg: Experiment) -> None:
    """Raises ConfigError for a changed field of the model: its parameters have fixed shapes."""
    changed = [
        line
        for line in files.differences(stored, cfg)
        if line.split(".")[0] not in EDITABLE_SECTIONS
    ]
    if changed:
        raise ConfigError(
            f"{command} cannot change {changed[0]}: only fields of "
            f"{', '.join(EDITABLE_SECTIONS)} can change."
        )
