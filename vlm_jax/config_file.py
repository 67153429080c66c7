"""Experiments as files: loaded from Python, kept as JSON, compared field by field, overridden on the command line."""

import dataclasses
import difflib
import importlib.util
import json
import sys
import typing
from pathlib import Path

import tyro

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.validate import choices, flat


def nearest(word: str, choices) -> str:
    """' (perhaps you meant X)' where a choice is close to the word."""
    close = difflib.get_close_matches(word, list(choices), 1)
    return f" (perhaps you meant {close[0]})" if close else ""


def load(path: str) -> Experiment:
    """The experiment of a config file: what its `get_config()` returns, its workdir runs/<name of the file>.

    Raises:
      ConfigError: no such file, or one that does not define an experiment.
    """
    file = Path(path)
    if not file.is_file():
        others = sorted(file.parent.glob("*.py")) if file.parent.is_dir() else []
        hint = nearest(str(path), map(str, others)) or (f": there are {', '.join(map(str, others))}" if others else "")
        raise ConfigError(f"--config {path} does not exist{hint}.")
    try:
        cfg = _module(file).get_config()
    except Exception as error:
        raise ConfigError(f"--config {path} could not be loaded: {type(error).__name__}: {error}.") from error
    if not isinstance(cfg, Experiment):
        raise ConfigError(f"--config {path}: get_config() must return an Experiment, not {type(cfg).__name__}.")
    return cfg if cfg.workdir else dataclasses.replace(cfg, workdir=f"runs/{file.stem}")


def _module(file: Path):
    """Runs a config file; it may import its neighbours by name."""
    spec = importlib.util.spec_from_file_location(f"vlm_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def override(cfg: Experiment, arguments: list[str], program: str) -> Experiment:
    """The experiment with `--any.field VALUE` applied; tyro explains a value of a wrong type and exits with code 2.

    Raises:
      ConfigError: a field or a choice that does not exist.
    """
    _refuse_unknown(cfg, arguments)
    return tyro.cli(Experiment, default=cfg, args=arguments, prog=program, config=(tyro.conf.FlagConversionOff,))


def _refuse_unknown(cfg: Experiment, arguments: list[str]) -> None:
    allowed_words, name = choices(cfg), ""
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name != "help" and name not in allowed_words:
                raise ConfigError(f"--{name} is no field{nearest(name, allowed_words)}; --help lists all of them.")
        else:
            value = argument
        allowed = allowed_words.get(name)
        if allowed and value and value not in allowed:
            raise ConfigError(f"--{name} {value} is no choice{nearest(value, allowed)}: choose {', '.join(allowed)}.")


def to_json(cfg: Experiment) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_json(text: str, name: str) -> Experiment:
    """The experiment that `to_json` wrote, equal to the one it was given.

    Raises:
      ConfigError: the text is no JSON, or lacks a field, or has one too many; `name` says whose text it is.
    """
    try:
        return _rebuilt(Experiment, json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name} is not the config of a run of this version: {error}.") from None


def _rebuilt(kind, values):
    names = {field.name for field in dataclasses.fields(kind)}
    if names != set(values):
        raise ValueError(f"the fields {sorted(names ^ set(values))} of {kind.__name__} are missing or unknown")
    types = typing.get_type_hints(kind)
    built = {}
    for name, value in values.items():
        nested = dataclasses.is_dataclass(types[name])
        built[name] = _rebuilt(types[name], value) if nested else _tuples(value)
    return kind(**built)


def _tuples(value):
    """Tuples, where JSON has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def differences(a: Experiment, b: Experiment) -> list[str]:
    """A line `section.field: value in a -> value in b` for every field that differs; workdir is not compared."""
    old, new = flat(a), flat(b)
    return [f"{name}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name] and name != "workdir"]
