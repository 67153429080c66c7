"""Validates experiments; a message names the fields and a remedy."""

import dataclasses
import types
import typing

from vlm_jax.config import (
    ConfigError,
    Contrastive,
    Experiment,
    Transformer,
    Vision,
    naming_source,
)
from vlm_jax.config.bounds import PATHS, check_number, check_path
from vlm_jax.config.checks import CHECKS
from vlm_jax.config.hints import either

# Types of `int | None` and of `Literal["a"] | None`.
UNIONS = (types.UnionType, typing.Union)


def validate(cfg: Experiment) -> Experiment:
    """Returns the experiment unchanged.

    Raises:
      ConfigError: a value is invalid, or two contradict each other.
    """
    check_values(cfg)
    _paths(flat(cfg))
    # Images of public models may have a border that is not a whole patch: a convolution drops it.
    drops_border = cfg.vision.has_encoder and cfg.vision.patch_embed == "conv"
    if not cfg.vision.checkpoint and not drops_border:
        _patches(cfg.vision)
    for check in CHECKS:
        check(cfg)
    cfg.distributed.check()
    if cfg.data.mixture:
        _check_parts(cfg)
    return cfg


def _check_parts(cfg: Experiment) -> None:
    """Validates the experiment with the data of each source of a mixture."""
    evaluation = dataclasses.replace(cfg.eval, files=(), source="")
    for name, part in cfg.parts.items():
        with naming_source(name):
            validate(dataclasses.replace(part, eval=evaluation))


def check_values(cfg: Experiment | Vision | Contrastive) -> None:
    """Checks single values and the sizes of a model; a part of `validate`.

    Used alone for the model that a public checkpoint's config.json describes.

    Raises:
      ConfigError: a value is invalid for its field, or heads do not fit the width.
    """
    part = "vision." if isinstance(cfg, Vision) else ""
    check_types(cfg, part)
    values = flat(cfg, part)
    for path, kind in kinds(cfg, part).items():
        value, choices = values[path], literal_choices(kind)
        if value is None:
            continue
        words = value if isinstance(value, tuple) else (value,)
        wrong = [word for word in words if choices and word not in choices]
        if wrong:
            raise ConfigError(
                f"{path} {wrong[0]!r} is not a valid choice: choose {', '.join(choices)}."
            )
        # A text encoder has the bounds of a decoder.
        check_number(path.replace("text.", "decoder."), value, is_optional(kind))
    if isinstance(cfg, Experiment):
        _heads(cfg.decoder, "decoder")
        _rotary(cfg.decoder)
    if isinstance(cfg, Contrastive):
        _heads(cfg.text, "text")
    vision = cfg if isinstance(cfg, Vision) else cfg.vision
    if vision.has_encoder:
        _heads(vision, "vision")
        _patch_rotary(vision)
    else:
        _patches(vision)


def check_types(cfg, prefix: str = "") -> None:
    """Raises ConfigError for a value of the wrong type, which dataclasses do not check."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        if not _fits(value, kind):
            raise ConfigError(f"{prefix}{name} is {value!r}: it must be {_type_name(kind)}.")
        for path, section in sections(f"{prefix}{name}", value).items():
            check_types(section, f"{path}.")


def _fits(value, kind) -> bool:
    if typing.get_origin(kind) in UNIONS:
        return any(_fits(value, option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        element_types = typing.get_args(kind)
        if element_types[-1] is Ellipsis:
            element_types = element_types[:1] * len(value)
        return len(value) == len(element_types) and all(map(_fits, value, element_types))
    if kind in (int, float):
        # Not isinstance: True is an int.
        return type(value) in (int, kind)
    return isinstance(value, str if literal_choices(kind) else kind)


def _type_name(kind) -> str:
    if typing.get_origin(kind) is tuple:
        element_types = typing.get_args(kind)
        number = "" if element_types[-1] is Ellipsis else f"{len(element_types)} "
        return f"a tuple of {number}{_type_name(element_types[0])}"
    if typing.get_origin(kind) in UNIONS:
        return " or ".join(map(_type_name, typing.get_args(kind)))
    if kind is types.NoneType:
        return "None"
    choices = literal_choices(kind)
    return either(choices) if choices else kind.__name__


def flat(cfg, prefix: str = "") -> dict[str, object]:
    """Flattens nested dataclasses to {"section.field": value}."""
    values = {}
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), f"{prefix}{field.name}"
        nested = sections(name, value)
        for path, section in nested.items():
            values |= flat(section, f"{path}.")
        if not nested:
            values[name] = value
    return values


def sections(name: str, value) -> dict[str, object]:
    """Returns the dataclasses that a field holds: itself, or a tuple's as `name.INDEX`."""
    if dataclasses.is_dataclass(value):
        return {name: value}
    if isinstance(value, tuple) and all(map(dataclasses.is_dataclass, value)):
        return {f"{name}.{index}": section for index, section in enumerate(value)}
    return {}


def with_fields(cfg, values: typing.Mapping[str, object]):
    """Returns an experiment or a section with other values of some fields, named as in `flat`."""
    for name, value in values.items():
        cfg = _with_field(cfg, name.split("."), value)
    return cfg


def _with_field(section, path: list[str], value):
    if not path:
        return value
    name, *deeper = path
    if isinstance(section, tuple):
        elements = list(section)
        elements[int(name)] = _with_field(elements[int(name)], deeper, value)
        return tuple(elements)
    inner = _with_field(getattr(section, name), deeper, value)
    return dataclasses.replace(section, **{name: inner})


def kinds(cfg, prefix: str = "") -> dict[str, object]:
    """Returns the types of nested dataclasses' fields as {"section.field": type}."""
    fields = {}
    for name, kind in typing.get_type_hints(type(cfg)).items():
        nested = sections(f"{prefix}{name}", getattr(cfg, name))
        for path, section in nested.items():
            fields |= kinds(section, f"{path}.")
        if not nested:
            fields[prefix + name] = kind
    return fields


def literal_choices(kind) -> tuple[str, ...]:
    """Returns the choices of a Literal, optional or in a tuple; empty for other types."""
    kind = element_type(required_type(kind))
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def is_optional(kind) -> bool:
    """Returns True for `T | None`."""
    return types.NoneType in typing.get_args(kind)


def required_type(kind):
    """Returns T for `T | None`, and other types unchanged."""
    if not is_optional(kind):
        return kind
    return next(option for option in typing.get_args(kind) if option is not types.NoneType)


def element_type(kind):
    """Returns the innermost element type of a tuple type, and other types unchanged."""
    while typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    return kind


def _paths(values: dict[str, object]):
    for path in PATHS:
        value = values[path]
        for element_path in value if isinstance(value, tuple) else (value,):
            check_path(path, element_path)


def _patches(vision):
    size, patch = vision.image_size_px, vision.patch_size_px
    if size % patch and not vision.is_native:
        fitting = [p for p in range(1, size + 1) if size % p == 0]
        raise ConfigError(
            f"vision.image_size_px {size} is not a multiple of vision.patch_size_px {patch}: "
            f"patches of {', '.join(map(str, fitting))} px fit."
        )


def _heads(part: Transformer, name: str):
    if part.head_dim is None and part.width % part.heads:
        raise ConfigError(
            f"{name}.width {part.width} is not a multiple of {name}.heads {part.heads}."
        )
    if part.heads % part.num_kv_heads:
        raise ConfigError(
            f"{name}.heads {part.heads} is not a multiple of {name}.kv_heads {part.kv_heads}."
        )


def _patch_rotary(vision):
    if vision.rope.kind != "none" and vision.head_width % 4:
        raise ConfigError(
            f"vision.rope.kind {vision.rope.kind} needs a multiple of 4 as the head dimension "
            f"(vision.head_dim, or vision.width / vision.heads), not {vision.head_width}."
        )


def _rotary(decoder):
    if decoder.positions == "rope" and (
        decoder.rotary_dim % 2 or not 0 < decoder.rotary_dim <= decoder.head_width
    ):
        raise ConfigError(
            f"decoder.rope.fraction {decoder.rope.fraction} of a head dimension of "
            f"{decoder.head_width} is {decoder.rotary_dim}: RoPE needs an even number of "
            "dimensions, from 2 to all."
        )
