"""The model of a command: a training run or a public checkpoint, and the options of its answers."""

import argparse
from collections.abc import Mapping

from vlm_jax.cli.experiment import parse_experiment
from vlm_jax.cli.options import ADAPTER, FOLDER, INTERMEDIATE_LAYERS, STEP, parse_options
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.runtime.workdir import is_run

MODEL_OPTIONS = {
    "workdir": {"metavar": FOLDER, "help": "work folder of a training run"},
    "checkpoint": {"metavar": FOLDER, "help": "folder of a public checkpoint"},
    "step": STEP,
    "adapter": ADAPTER,
    "intermediate_layers": INTERMEDIATE_LAYERS,
}
AGAINST = {
    "metavar": FOLDER,
    "help": "a second model, to compare side by side: folder of a run or of a checkpoint",
}
ANSWER_OPTIONS = {
    "max_new_tokens": {
        "type": int,
        "metavar": "N",
        "help": "most tokens of an answer (default: eval.max_new_tokens of a run, 256 of a "
        "checkpoint)",
    },
    "temperature": {
        "type": float,
        "default": 0.0,
        "metavar": "T",
        "help": "of the sampling; 0 takes the most likely token (default: 0)",
    },
    "top_k": {
        "type": int,
        "default": 0,
        "metavar": "K",
        "help": "sample from the K most likely tokens; 0: from all (default: 0)",
    },
    "top_p": {
        "type": float,
        "default": 1.0,
        "metavar": "P",
        "help": "sample from the most likely tokens with total probability P (default: 1)",
    },
    "seed": {"type": int, "default": 0, "metavar": "N", "help": "of the sampling (default: 0)"},
    "stop": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "TEXT",
        "help": "texts that end an answer and are not part of it",
    },
}
CHECKPOINT_ONLY = ("adapter", "no_chat", "intermediate_layers")


def parse_model(
    command: str, arguments: list[str], options: Mapping[str, Mapping], description: str
) -> tuple[argparse.Namespace, Experiment | None]:
    """Parses the options of a command that takes MODEL_OPTIONS and ANSWER_OPTIONS among its own.

    Returns:
      The values by name; and the experiment of the run in --workdir, with changed fields.

    Raises:
      ConfigError: a mistake in an option, or not one model is named.
    """
    names_run = any(argument.partition("=")[0] == "--workdir" for argument in arguments)
    args, fields = parse_options(command, arguments, options, description, keep_unknown=names_run)
    cfg = _parse_run(command, args, fields, options) if args.workdir else None
    _check_model(command, args)
    return args, cfg


def open_model(args: argparse.Namespace, cfg: Experiment | None):
    """Returns the `infer.models.TextModel` that the values of `parse_model` name."""
    from vlm_jax.infer import models

    if cfg:
        return models.open_run(cfg, args.step)
    return models.open_checkpoint(args.checkpoint, args.intermediate_layers, args.adapter)


def open_folder(command: str, folder: str):
    """Returns the `infer.models.TextModel` in a folder of a run or of a public checkpoint."""
    from vlm_jax.infer import models

    if is_run(folder):
        return models.open_run(parse_experiment(command, ["--workdir", folder], stored=True))
    return models.open_checkpoint(folder)


def answer_options(args: argparse.Namespace, cfg: Experiment | None):
    """Returns the checked `infer.answer.AnswerOptions` of the values of `parse_model`."""
    from vlm_jax.infer.answer import AnswerOptions

    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    if args.max_new_tokens is not None:
        sampling["max_new_tokens"] = args.max_new_tokens
    elif cfg:
        sampling["max_new_tokens"] = cfg.eval.max_new_tokens
    options = AnswerOptions(
        **sampling, chat=not getattr(args, "no_chat", False), stop=tuple(args.stop)
    )
    options.check(spell)
    return options


def check_effect(options) -> None:
    """Raises ConfigError for an option of sampling beside a temperature of 0.

    Args:
      options: `infer.answer.AnswerOptions` that stay as they are for all answers.
    """
    if options.temperature:
        return
    for name in ("top_k", "top_p"):
        value = getattr(options, name)
        if value != ANSWER_OPTIONS[name]["default"]:
            raise ConfigError(
                f"{spell(name)} {value} has no effect with --temperature 0, which takes the most "
                f"likely token: set --temperature, such as 0.7, or leave {spell(name)} out."
            )


def spell(name: str) -> str:
    """Returns an option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _parse_run(
    command: str, args: argparse.Namespace, fields: list[str], options: Mapping[str, Mapping]
) -> Experiment:
    """Returns the experiment of the run in --workdir, with changed fields."""
    if args.checkpoint:
        raise ConfigError(
            f"--workdir {args.workdir} and --checkpoint {args.checkpoint} are two models: leave "
            "one out."
        )
    for name in CHECKPOINT_ONLY:
        if getattr(args, name, None):
            raise ConfigError(f"{spell(name)} applies to --checkpoint only, not to --workdir.")
    help_texts = {name.replace("_", "-"): option["help"] for name, option in options.items()}
    arguments = ["--workdir", args.workdir, *fields]
    return parse_experiment(command, arguments, stored=True, options=help_texts)


def _check_model(command: str, args: argparse.Namespace) -> None:
    """Raises ConfigError if no model is named, or a run is named as a checkpoint."""
    if not args.workdir and not args.checkpoint:
        raise ConfigError(
            f"{command} needs --workdir DIR, the folder of a run, or --checkpoint DIR, a public "
            "checkpoint."
        )
    if args.checkpoint and args.step is not None:
        raise ConfigError("--step applies to --workdir only, not to --checkpoint.")
    if args.checkpoint and is_run(args.checkpoint):
        raise ConfigError(
            f"--checkpoint {args.checkpoint} is the folder of a run: name it with --workdir "
            f"{args.checkpoint}."
        )
