"""Experiments as files: loaded from Python, saved as JSON, compared, overridden by options."""

import dataclasses
import difflib
import importlib.util
import json
import os
import sys
import typing
from pathlib import Path

from vlm_jax.config import (
    ConfigError,
    Data,
    Decoder,
    Distributed,
    Eval,
    Experiment,
    Fusion,
    Optim,
    Rope,
    Train,
    Vision,
)
from vlm_jax.config.hints import nearest, nearest_field, suggestion
from vlm_jax.config.model import PRETRAINED_PARTS
from vlm_jax.config.validate import (
    check_types,
    element_type,
    flat,
    is_optional,
    kinds,
    literal_choices,
    required_type,
)

CONFIGS = Path(__file__).parents[2] / "configs"
# Fields that may be set to "" although their default is another text.
MAY_BE_EMPTY = (
    "eval.split",
    "data.image_field",
    "data.question_field",
    "train.compilation_cache_dir",
)
# Fields in config.json of older versions that have another default, name or value today.
# Defaults are for fields that the file lacks.
OLD_DEFAULTS = {Fusion: {"qk_norm": False}}
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
    **{(kind, "qk_norm", False): "none" for kind in (Vision, Decoder)},
    **{(kind, "qk_norm", True): "head" for kind in (Vision, Decoder)},
    **{(kind, "layer_scale", "tanh"): "tanh_gate" for kind in (Vision, Decoder)},
    (Fusion, "tokens_without_image", "skip"): "mask_out",
    (Fusion, "tokens_without_image", "read_all"): "attend_all",
    **{(kind, "kv_heads", 0): None for kind in (Vision, Decoder)},
    **{(kind, "head_dim", 0): None for kind in (Vision, Decoder)},
    **{(kind, "query_scale", 0): None for kind in (Vision, Decoder)},
    **{(kind, "score_softcap", 0): None for kind in (Vision, Decoder)},
    (Vision, "resize_px", 0): None,
    (Vision, "classes", 0): None,
    (Rope, "local_theta", 0): None,
    (Decoder, "sliding_window", 0): None,
    (Decoder, "logit_softcap", 0): None,
    (Data, "cell_px", 0): None,
    (Data, "bos_id", -1): None,
    (Train, "loss_chunk", 0): None,
    (Train, "keep_every_steps", 0): None,
    (Eval, "max_examples", 0): None,
    (Distributed, "num_processes", 0): None,
    (Distributed, "process_id", -1): None,
}
FORMS = """Every field is an option --section.field VALUE. Defaults are those of the config or run.

examples:
  {program} ... --optim.learning_rate 5e-4        a number
  {program} ... --fusion.gated True               True or False
  {program} ... --data.augment mirror shift       several values
  {program} ... --data.augment                    an empty list of values
  {program} ... --eval.split ""                   an empty text
  {program} ... --data.bos_id None                no value, where None is allowed
  {program} ... --data.mixture.0.weight 2         a field of the first source of a config's mixture
"""
NUMBERS = {int: "a whole number", float: "a number"}


def load(path: str) -> Experiment:
    """Loads the experiment that a config file's `get_config()` returns.

    Its workdir is runs/<name of the config> if the file sets none.

    Raises:
      ConfigError: the file does not exist, or does not define an experiment.
    """
    file = Path(path)
    if file.exists() and (file.is_dir() or file.suffix != ".py"):
        raise ConfigError(f"--config {path} is not a config: {_suggest_use(file)}.")
    if not file.is_file():
        raise ConfigError(f"--config {path} does not exist{_existing_configs(file)}.")
    try:
        cfg = _module(file).get_config()
    # A config that calls exit() must not end the command without a message.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"--config {path} could not be loaded: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(cfg, Experiment):
        raise ConfigError(
            f"--config {path}: get_config() must return an Experiment, not {type(cfg).__name__}."
        )
    return cfg if cfg.workdir else dataclasses.replace(cfg, workdir=f"runs/{_name(file)}")


def _suggest_use(path: Path) -> str:
    """Returns the option for an existing path that is not a Python file."""
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        return (
            f"continue a run with --workdir {folder}, or name a public checkpoint with "
            f"--checkpoint {folder}"
        )
    return f"choose a Python file, such as {CONFIGS.name}/easy_vqa/unified.py"


def _existing_configs(missing: Path) -> str:
    """Suggests configs for a missing file: by name in `configs`, or in the file's own folder."""
    paths = {}
    for file in sorted(CONFIGS.rglob("*.py")):
        paths[file.stem] = paths[_name(file)] = _relative(file)
    if missing.stem in paths:
        return suggestion([paths[missing.stem]])
    if missing.parent.name:
        paths |= {file.stem: str(file) for file in sorted(missing.parent.glob("*.py"))}
    close = difflib.get_close_matches(missing.stem, paths, 1)
    if close:
        return suggestion([paths[close[0]]])
    return f": choose one of {', '.join(dict.fromkeys(paths.values()))}"


def _name(file: Path) -> str:
    """Returns `easy_vqa_unified` for configs/easy_vqa/unified.py, and the stem of other files."""
    path = file.resolve()
    if not path.is_relative_to(CONFIGS):
        return file.stem
    return "_".join(path.relative_to(CONFIGS).with_suffix("").parts)


def _relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _module(file: Path):
    """Runs a config file, which may import files of its folder and of `configs`."""
    spec = importlib.util.spec_from_file_location(f"vlm_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path[:0] = [str(file.parent.resolve()), str(CONFIGS.parent)]
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.path[:2]
    return module


def check_given_once(options: list[str]) -> None:
    """Raises ConfigError if an option is repeated: only its last values would be used."""
    for name in options:
        if options.count(name) > 1:
            raise ConfigError(f"{name} is given twice: give all values after one option.")


def override(
    cfg: Experiment, arguments: list[str], program: str, options: dict[str, str] | None = None
) -> Experiment:
    """Applies options `--section.field VALUE` to an experiment; tyro parses them and prints help.

    Args:
      options: other options of the program and their help; they are not in `arguments`.

    Raises:
      ConfigError: a field or a choice does not exist, an option is given twice, or a value has the
        wrong type (in `cfg` too).
    """
    check_types(cfg)
    fields, options = kinds(cfg), options or {}
    options_and_values = [(name, x) for name, x in _options(arguments) if name != "help"]
    check_given_once([f"--{name}" for name, _ in options_and_values])
    for name, values in options_and_values:
        _check_option(fields, name, values, options)
    # Imported here: of a run, only its command line needs it.
    import tyro

    return tyro.cli(
        Experiment,
        default=cfg,
        args=arguments,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
        prog=program,
        description=_help_header(program, options),
    )


def explicit_fields(cfg: Experiment, arguments: list[str]) -> set[str]:
    """Returns the fields that the user set in addition to a checkpoint.

    These are options of the command line, and fields that a config sets in a section whose
    checkpoint it names itself. If only the command line names the checkpoint, the config's settings
    of that part were written for another model.
    """
    names = {name for name, _ in _options(arguments)}
    values, defaults = flat(cfg), flat(Experiment())
    for section in PRETRAINED_PARTS:
        if cfg.init_from or values[f"{section}.checkpoint"]:
            changed = {name for name in values if values[name] != defaults.get(name)}
            names |= {name for name in changed if name.startswith(f"{section}.")}
    return names


def _help_header(program: str, options: dict[str, str]) -> str:
    """Returns the help above the fields: examples, and a line for each of the other options."""
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
        hint = nearest_field(name, [*options, *fields])
        raise ConfigError(f"--{name} is not a field{hint}; --help lists all of them.")
    if dataclasses.is_dataclass(element_type(fields[name])):
        raise ConfigError(
            f"--{name} cannot be given as an option: set it in a config file; its fields are then "
            f"options such as --{name}.0.weight."
        )
    count, is_repeated = _count_values(required_type(fields[name]))
    if len(values) % count if is_repeated else len(values) != count:
        expected = "one value" if count == 1 else f"{count} values"
        expected += " each" if is_repeated else ""
        expected += ", with spaces between them" if count > 1 else ""
        raise ConfigError(f"--{name} takes {expected}, not {' '.join(values) or 'none'}.")
    kind = required_type(element_type(required_type(fields[name])))
    if "" in values and flat(Experiment()).get(name) != "" and name not in MAY_BE_EMPTY:
        raise ConfigError(f"--{name} is empty.")
    choices = ("True", "False") if kind is bool else literal_choices(kind)
    for value in values:
        if value == "None" and is_optional(fields[name]):
            continue
        if choices and value not in choices:
            raise ConfigError(
                f"--{name} {value} is not a valid choice{nearest(value, choices)}: "
                f"choose {', '.join(choices)}."
            )
        try:
            if kind in NUMBERS:
                kind(value)
        except ValueError:
            raise ConfigError(f"--{name} {value} is not {NUMBERS[kind]}.") from None


def _count_values(kind) -> tuple[int, bool]:
    """Returns the number of values of a type, and True if they may be repeated."""
    if typing.get_origin(kind) is not tuple:
        return 1, False
    element_types = typing.get_args(kind)
    if element_types[-1] is Ellipsis:
        return _count_values(element_types[0])[0], True
    return sum(_count_values(element)[0] for element in element_types), False


def to_json(cfg: Experiment) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_json(text: str | bytes, name: str) -> Experiment:
    """Parses the experiment that `to_json` wrote, in this or an older version.

    Missing fields have their defaults, so that later versions with more fields load older runs.

    Args:
      name: the file of the text, for messages.

    Raises:
      ConfigError: the text is not JSON, lacks a section, or has an unknown field.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if "model_type" in values:
            raise ConfigError(
                f"{name} belongs to a public checkpoint, not to a run: name its folder with "
                "--checkpoint."
            )
        return _reset_unused(_rebuild(Experiment, _as_trained(values)))
    except ConfigError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(
            f"{name} is not the config of a run: it is not a text file in UTF-8."
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name} is not the config of a run of this version: {error}.") from None


def _as_trained(values: dict) -> dict:
    """Sets fields by which this version would compute another model than an older one.

    A field that the older version lacked tells that it is older.
    """
    sections = {name: dict(values[name]) for name in ("train", "projector") if name in values}
    train, projector = sections.get("train", {}), sections.get("projector", {})
    if train.get("frozen_dtype") == "nf4":
        train.setdefault("double_quantization", False)
    if projector.get("kind") in ("pixel_shuffle", "average_pool") and "projection" not in projector:
        # They had a bias in any case.
        projector["bias"] = True
    return values | sections


def _reset_unused(cfg: Experiment) -> Experiment:
    """Resets fusion fields without effect, whose defaults have changed between versions."""
    defaults = {name: getattr(Fusion(), name) for name in cfg.fusion.unused}
    return dataclasses.replace(cfg, fusion=dataclasses.replace(cfg.fusion, **defaults))


def _rebuild(kind, values):
    """Builds a dataclass from its JSON."""
    if isinstance(values, dict):
        values = dict(_rename(kind, name, value) for name, value in values.items())
    fields = dataclasses.fields(kind)
    names = {field.name for field in fields}
    sections = {field.name for field in fields if field.default is dataclasses.MISSING}
    wrong = (sections - set(values)) | (set(values) - names)
    if wrong:
        raise ValueError(f"the fields {sorted(wrong)} of {kind.__name__} are missing or unknown")
    types = typing.get_type_hints(kind)
    arguments = {}
    for name, value in (OLD_DEFAULTS.get(kind, {}) | values).items():
        element = element_type(types[name])
        if not dataclasses.is_dataclass(element):
            arguments[name] = _tuples(value)
        elif isinstance(value, list):
            arguments[name] = tuple(_rebuild(element, section) for section in value)
        else:
            arguments[name] = _rebuild(element, value)
    return kind(**arguments)


def updated(fields: typing.Mapping[str, object]) -> dict[str, object]:
    """Returns fields {"section.field": value} of an earlier version as this version has them."""
    return dict(_updated(Experiment, name, value) for name, value in fields.items())


def _updated(kind, name: str, value) -> tuple[str, object]:
    name, dot, rest = name.partition(".")
    name, value = _rename(kind, name, value)
    section = typing.get_type_hints(kind).get(name)
    if dataclasses.is_dataclass(section):
        rest, value = _updated(section, rest, value)
    return f"{name}{dot}{rest}", value


def _rename(kind, name: str, value) -> tuple[str, object]:
    """Returns the name and the value of a field in this version."""
    name = OLD_NAMES.get((kind, name), name)
    if isinstance(value, (str, int, float)):
        value = OLD_VALUES.get((kind, name, value), value)
    return name, value


def _tuples(value):
    """Converts JSON lists to tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def differences(a: Experiment, b: Experiment) -> list[str]:
    """Returns a line `section.field: a's value -> b's value` for each difference except workdir."""
    old, new = flat(a), flat(b)
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name) and name != "workdir"
    ]
