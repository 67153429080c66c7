"""Options of commands that take their own, beside the fields of an experiment."""

import argparse
from collections.abc import Mapping

from vlm_jax.config import ConfigError
from vlm_jax.config.files import check_given_once
from vlm_jax.config.hints import nearest_field

# Names in other programs -> the option.
SYNONYMS = {
    **dict.fromkeys(
        ("model", "model_path", "model_name_or_path", "pretrained", "folder", "dir"), "checkpoint"
    ),
    **dict.fromkeys(("images", "image_file", "image_path", "img", "file"), "image"),
    **dict.fromkeys(("text", "question", "query", "input", "prompts"), "prompt"),
    **dict.fromkeys(
        ("max_tokens", "max_length", "max_new", "new_tokens", "length"), "max_new_tokens"
    ),
    **dict.fromkeys(("temp", "t"), "temperature"),
    **dict.fromkeys(("out", "out_dir", "output_dir", "save_dir"), "output"),
    **dict.fromkeys(("tol", "tolerance", "rtol"), "atol"),
    "taps": "intermediate_layers",
}
INTERMEDIATE_LAYERS = {
    "choices": ("input", "output"),
    "help": "Llama 3.2 Vision only: whether intermediate_layers_indices count the inputs of layers "
    "(Meta's code, transformers up to 4.51) or their outputs (transformers 5)",
}
# Metavars of options that must not be empty.
FOLDER, FILE = "DIR", "FILE"
ADAPTER = {
    "metavar": FOLDER,
    "help": "folder of a LoRA adapter in PEFT's format, which is merged into --checkpoint",
}
STEP = {
    "metavar": "STEP",
    "help": "checkpoint of the run: last (default), best by train.best_metric, or the number of "
    "its step",
}
# Room for long names of options, within 100 columns.
HELP_COLUMNS, NAME_COLUMNS = 98, 26


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for a mistake, and can leave unknown options to others.

    An option given twice is a mistake: argparse would use the last without a word.
    """

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args, namespace=None):
        names = [argument.partition("=")[0] for argument in args]
        own_options = self._option_string_actions.keys() - {"-h", "--help"}
        check_given_once([name for name in names if name in own_options])
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise ConfigError(f"{message}.")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=NAME_COLUMNS, width=HELP_COLUMNS)


def parse_options(
    command: str,
    arguments: list[str],
    options: Mapping[str, Mapping],
    description: str,
    keep_unknown: bool = False,
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options of a command, spelled with hyphens or underscores.

    Args:
      options: name -> settings of `add_argument`.
      description: printed by --help above the options.
      keep_unknown: returns unknown arguments, instead of refusing them.

    Returns:
      The values by name, and the unknown arguments.

    Raises:
      ConfigError: an unknown option, a missing value, or a value of the wrong type.
    """
    parser = _build_parser(command, None, options, description)
    names = {name.replace("_", "-"): name for name in options}
    arguments = [_hyphenate(argument) for argument in arguments]
    if not keep_unknown:
        _refuse_unknown(command, arguments, names)
    values, unknown = parser.parse_known_args(arguments)
    if unknown and not keep_unknown:
        raise ConfigError(f"unrecognized arguments: {' '.join(unknown)}.")
    for name, settings in options.items():
        if settings.get("metavar") in (FOLDER, FILE) and getattr(values, name) == "":
            raise ConfigError(f"--{name} is empty.")
    return values, unknown


def format_help(command: str, usage: str, options: Mapping[str, Mapping], description: str) -> str:
    """Returns the help of a command that parses its arguments itself.

    Args:
      usage: its arguments, in a line.
      options, description: as in `parse_options`.
    """
    usage = f"python run.py {command} {usage}"
    return _build_parser(command, usage, options, description).format_help()


def _build_parser(
    command: str, usage: str | None, options: Mapping[str, Mapping], description: str
) -> Parser:
    parser = Parser(
        prog=f"python run.py {command}",
        usage=usage,
        description=description,
        formatter_class=_Formatter,
    )
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **settings)
    return parser


def _refuse_unknown(command: str, arguments: list[str], names: Mapping[str, str]) -> None:
    flags = [argument for argument in arguments if argument.startswith("--")]
    known = {f"--{name}" for name in (*names, "help")}
    unknown = [flag[2:].partition("=")[0] for flag in flags if flag.partition("=")[0] not in known]
    if unknown:
        hint = nearest_field(unknown[0], names, SYNONYMS)
        choices = ", ".join(f"--{name}" for name in names)
        raise ConfigError(f"{command} has no option --{unknown[0]}{hint}: choose {choices}.")


def _hyphenate(argument: str) -> str:
    """--max_new_tokens=3 -> --max-new-tokens=3."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
