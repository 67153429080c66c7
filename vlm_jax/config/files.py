"""Experiments as files: loaded from Python, kept as JSON, compared field by field, overridden on the command line."""

import dataclasses
import difflib
import importlib.util
import json
import os
import sys
import typing
from pathlib import Path

import tyro

from vlm_jax.config import ConfigError, Decoder, Experiment, Fusion, Optim, Vision
from vlm_jax.config.hints import nearest, nearest_field, suggestion
from vlm_jax.config.validate import (
    check_types,
    element,
    flat,
    kinds,
    words,
)

CONFIGS = Path(__file__).parents[2] / "configs"
MAY_BE_EMPTY = (  # beside what is empty by default
    "eval.split",
    "data.image_field",
    "data.question_field",
    "train.compilation_cache_dir",
)
# config.json of runs of older versions: fields that have another default, name or value today.
OLD_DEFAULTS = {Fusion: {"qk_norm": False}}  # of fields that the file lacks
OLD_NAMES = {
    **{(kind, "norm_order"): "norm_position" for kind in (Vision, Decoder)},
    **{(kind, "residual_scale"): "layer_scale" for kind in (Vision, Decoder)},
    (Vision, "global_depth"): "num_global_layers",
    (Decoder, "tied_head"): "tie_word_embeddings",
    (Fusion, "blind_rows"): "tokens_without_image",
    (Optim, "rate_scale"): "lr_mult",
    (Optim, "final_fraction"): "final_lr_fraction",
}
OLD_VALUES = {
    **{(kind, "norm", "rmsnorm_centred"): "rmsnorm_zero_centered" for kind in (Vision, Decoder)},
    **{(kind, "norm_position", "both"): "sandwich" for kind in (Vision, Decoder)},
    **{(kind, "layer_scale", "tanh"): "tanh_gate" for kind in (Vision, Decoder)},
    (Fusion, "tokens_without_image", "skip"): "mask_out",
    (Fusion, "tokens_without_image", "read_all"): "attend_all",
}
FORMS = """Every field is an option, --section.field VALUE; the default is the value in the config or in the run.

examples:
  {program} ... --optim.learning_rate 5e-4        a number
  {program} ... --fusion.gated True               True or False
  {program} ... --data.augment mirror shift       several values
  {program} ... --data.augment                    no value of several
  {program} ... --eval.split ""                   an empty text
"""
NUMBERS = {int: "a whole number", float: "a number"}


def load(path: str) -> Experiment:
    """The experiment of a config file: what its `get_config()` returns, its workdir runs/<name of the config>.

    Raises:
      ConfigError: no such file, or one that does not define an experiment.
    """
    file = Path(path)
    if file.exists() and (file.is_dir() or file.suffix != ".py"):
        raise ConfigError(f"--config {path} is not a config: {_use_of(file)}.")
    if not file.is_file():
        raise ConfigError(f"--config {path} does not exist{_existing_configs(file)}.")
    try:
        cfg = _module(file).get_config()
    except (
        Exception,
        SystemExit,
    ) as error:  # a config that calls exit() is no way to end a command either
        raise ConfigError(
            f"--config {path} could not be loaded: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(cfg, Experiment):
        raise ConfigError(
            f"--config {path}: get_config() must return an Experiment, not {type(cfg).__name__}."
        )
    return cfg if cfg.workdir else dataclasses.replace(cfg, workdir=f"runs/{_name(file)}")


def _use_of(path: Path) -> str:
    """What an existing folder or file is for that is not a Python file."""
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        return f"a run is continued with --workdir {folder}, and a public checkpoint is named by --checkpoint {folder}"
    return f"choose a Python file, such as {CONFIGS.name}/easy_vqa/unified.py"


def _existing_configs(missing: Path) -> str:
    """The configs that may have been meant: of the same name in `configs`, or those beside the missing file."""
    files = {file: _relative(file) for file in sorted(CONFIGS.rglob("*.py"))}
    known = {file.stem: path for file, path in files.items()} | {
        _name(file): path for file, path in files.items()
    }
    if missing.stem in known:
        return suggestion([known[missing.stem]])
    beside = sorted(missing.parent.glob("*.py")) if missing.parent.name else []
    known |= {file.stem: str(file) for file in beside}
    close = difflib.get_close_matches(missing.stem, known, 1)
    return (
        suggestion([known[close[0]]])
        if close
        else f": choose one of {', '.join(dict.fromkeys(known.values()))}"
    )


def _name(file: Path) -> str:
    """Name of a config's work folder: `easy_vqa_unified` for configs/easy_vqa/unified.py, the stem elsewhere."""
    path = file.resolve()
    if not path.is_relative_to(CONFIGS):
        return file.stem
    return "_".join(path.relative_to(CONFIGS).with_suffix("").parts)


def _relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _module(file: Path):
    """Runs a config file, which may import the files beside it and those of `configs`."""
    spec = importlib.util.spec_from_file_location(f"vlm_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path[:0] = [str(file.parent.resolve()), str(CONFIGS.parent)]
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.path[:2]
    return module


def override(
    cfg: Experiment, arguments: list[str], program: str, options: dict[str, str] | None = None
) -> Experiment:
    """The experiment with `--any.field VALUE` applied; tyro reads the values and writes the help.

    `options` are what else the program takes and what the help says of each; they are not among the arguments.

    Raises:
      ConfigError: a field or a choice that does not exist, or a value of another type, in `cfg` too.
    """
    check_types(cfg)
    fields, options = kinds(cfg), options or {}
    for name, values in _options(arguments):
        if name != "help":
            _check_option(fields, name, values, options)
    texts = {"prog": program, "description": _described(program, options)}
    return tyro.cli(
        Experiment, default=cfg, args=arguments, config=(tyro.conf.FlagConversionOff,), **texts
    )


def explicit_fields(cfg: Experiment, arguments: list[str]) -> set[str]:
    """The fields that the user set beside a checkpoint.

    Those of the command line, and those that a config sets in a section whose checkpoint it names itself. Where the
    checkpoint comes from the command line alone, the config's settings of that part are not meant for it.
    """
    named = {name for name, _ in _options(arguments)}
    values, defaults = flat(cfg), flat(Experiment())
    for section in ("vision", "projector", "decoder"):
        if cfg.init_from or values[f"{section}.checkpoint"]:
            named |= {x for x in values if x.startswith(f"{section}.") and values[x] != defaults[x]}
    return named


def _described(program: str, options: dict[str, str]) -> str:
    """What the help shows above the fields: how they are given, and a line for each of the other options."""
    width = max(map(len, options), default=0)
    lines = [f"--{name:{width}}  {text}" for name, text in options.items()]
    return "\n".join([FORMS.format(program=program), *lines])


def _options(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """["--a.b", "1", "2", "--c=3"] -> [("a.b", ["1", "2"]), ("c", ["3"])]."""
    options: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if equals else []))
        elif argument == "-h":
            options.append(("help", []))
        elif not options:
            raise ConfigError(
                f"{argument!r} is not an option: fields are given as --section.field VALUE."
            )
        else:
            options[-1][1].append(argument)
    return options


def _check_option(
    fields: dict[str, object], name: str, values: list[str], options: dict[str, str]
) -> None:
    if name not in fields:
        hint = nearest_field(name, [*fields, *options])
        raise ConfigError(f"--{name} is not a field{hint}; --help lists all of them.")
    each, any_number = _number(fields[name])
    if len(values) % each if any_number else len(values) != each:
        wanted = ("one value" if each == 1 else f"{each} values") + " each" * any_number
        wanted += ", with spaces between them" * (each > 1)
        raise ConfigError(f"--{name} takes {wanted}, not {' '.join(values) if values else 'none'}.")
    kind = element(fields[name])
    if "" in values and flat(Experiment())[name] != "" and name not in MAY_BE_EMPTY:
        raise ConfigError(f"--{name} is empty.")
    allowed = ("True", "False") if kind is bool else words(kind)
    for value in values:
        if allowed and value not in allowed:
            raise ConfigError(
                f"--{name} {value} is no choice{nearest(value, allowed)}: choose {', '.join(allowed)}."
            )
        try:
            kind(value) if kind in NUMBERS else value
        except ValueError:
            raise ConfigError(f"--{name} {value} is not {NUMBERS[kind]}.") from None


def _number(kind) -> tuple[int, bool]:
    """How many values a field takes, and whether it takes any number of so many."""
    if typing.get_origin(kind) is not tuple:
        return 1, False
    of_each = typing.get_args(kind)
    if of_each[-1] is Ellipsis:
        return _number(of_each[0])[0], True
    return sum(_number(one)[0] for one in of_each), False


def to_json(cfg: Experiment) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_json(text: str | bytes, name: str) -> Experiment:
    """The experiment that `to_json` wrote, equal to the one it was given.

    A field that is missing has its default, so that later versions with more fields read older runs.

    Raises:
      ConfigError: the text is no JSON, or lacks a section, or has a field too many; `name` says whose text it is.
    """
    try:
        values = json.loads(text)
        if "model_type" in values:
            raise ConfigError(
                f"{name} is of a public checkpoint, not of a run: --checkpoint takes its folder."
            )
        return _without_unused(_rebuilt(Experiment, values))
    except ConfigError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name} is not the config of a run of this version: {error}.") from None


def _without_unused(cfg: Experiment) -> Experiment:
    """Sets the fusion fields that have no effect to their defaults, which were others in older versions."""
    defaults = {name: getattr(Fusion(), name) for name in cfg.fusion.unused}
    return dataclasses.replace(cfg, fusion=dataclasses.replace(cfg.fusion, **defaults))


def _rebuilt(kind, values):
    if isinstance(values, dict):
        values = dict(_renamed(kind, name, value) for name, value in values.items())
    fields = dataclasses.fields(kind)
    names = {field.name for field in fields}
    sections = {field.name for field in fields if field.default is dataclasses.MISSING}
    wrong = (sections - set(values)) | (set(values) - names)
    if wrong:
        raise ValueError(f"the fields {sorted(wrong)} of {kind.__name__} are missing or unknown")
    types = typing.get_type_hints(kind)
    built = {}
    for name, value in (OLD_DEFAULTS.get(kind, {}) | values).items():
        nested = dataclasses.is_dataclass(types[name])
        built[name] = _rebuilt(types[name], value) if nested else _tuples(value)
    return kind(**built)


def _renamed(kind, name: str, value) -> tuple[str, object]:
    """Name and value of a field as this version spells them."""
    name = OLD_NAMES.get((kind, name), name)
    return name, OLD_VALUES.get((kind, name, value), value) if isinstance(value, str) else value


def _tuples(value):
    """Tuples, where JSON has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def differences(a: Experiment, b: Experiment) -> list[str]:
    """A line `section.field: value in a -> value in b` for every field that differs; workdir is not compared."""
    old, new = flat(a), flat(b)
    return [
        f"{name}: {old[name]} -> {new[name]}"
        for name in old
        if old[name] != new[name] and name != "workdir"
    ]
