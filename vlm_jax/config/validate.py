"""Refuses an experiment that cannot work, with a sentence that names the fields and the way out."""

import dataclasses
import typing

from vlm_jax.config import (
    ConfigError,
    Contrastive,
    Experiment,
    Transformer,
    Vision,
)
from vlm_jax.config.bounds import PATHS, check_numbers, check_path
from vlm_jax.config.cross_checks import CHECKS


def validate(cfg: Experiment) -> Experiment:
    """Returns the experiment as it came.

    Raises:
      ConfigError: a value, or two together, cannot work.
    """
    check_values(cfg)
    _paths(flat(cfg))
    if not cfg.vision.checkpoint:  # public ones may leave pixels over at the border
        _patches(cfg.vision)
    for check in CHECKS:
        check(cfg)
    cfg.distributed.check()
    return cfg


def check_values(cfg: Experiment | Vision | Contrastive) -> None:
    """Raises ConfigError for a value that its field cannot have, or heads that do not fit the width; `validate` does.

    The sizes of a model alone, as a public checkpoint's config.json states them, are checked by this.
    """
    part = "vision." if isinstance(cfg, Vision) else ""
    check_types(cfg, part)
    values = flat(cfg, part)
    for path, kind in kinds(cfg, part).items():
        value, allowed = values[path], words(kind)
        wrong = [
            word
            for word in (value if isinstance(value, tuple) else (value,))
            if allowed and word not in allowed
        ]
        if wrong:
            raise ConfigError(
                f"{path} {wrong[0]!r} is not a valid choice: choose {', '.join(allowed)}."
            )
    check_numbers({path.replace("text.", "decoder."): value for path, value in values.items()})
    if isinstance(cfg, Experiment):
        _heads(cfg.decoder, "decoder")
        _turns(cfg.decoder)
    if isinstance(cfg, Contrastive):
        _heads(cfg.text, "text")
    vision = cfg if isinstance(cfg, Vision) else cfg.vision
    if vision.kind == "vit":
        _heads(vision, "vision")
    else:
        _patches(vision)


def check_types(cfg, prefix: str = "") -> None:
    """Raises ConfigError for a value of another type than its field's: dataclasses take any."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        if not _fits(value, kind):
            raise ConfigError(f"{prefix}{name} is {value!r}: it must be {_called(kind)}.")
        if dataclasses.is_dataclass(kind):
            check_types(value, f"{prefix}{name}.")


def _fits(value, kind) -> bool:
    if typing.get_origin(kind) is tuple:
        of_each = typing.get_args(kind)
        if isinstance(value, tuple) and of_each[-1] is Ellipsis:
            of_each = of_each[:1] * len(value)
        return (
            isinstance(value, tuple)
            and len(value) == len(of_each)
            and all(map(_fits, value, of_each))
        )
    if kind in (int, float):
        return type(value) in (int, kind)  # True is no number
    return isinstance(value, str if words(kind) else kind)


def _called(kind) -> str:
    if typing.get_origin(kind) is tuple:
        of_each = typing.get_args(kind)
        number = "" if of_each[-1] is Ellipsis else f"{len(of_each)} "
        return f"a tuple of {number}{_called(of_each[0])}"
    return "str" if words(kind) else kind.__name__


def flat(cfg, prefix: str = "") -> dict[str, object]:
    """Nested dataclasses -> {"section.field": value}."""
    found = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        nested = dataclasses.is_dataclass(value)
        found |= (
            flat(value, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": value}
        )
    return found


def with_fields(cfg, values: typing.Mapping[str, object]):
    """The experiment, or one of its sections, with other values of some fields, named as in `flat`."""
    for name, value in values.items():
        cfg = _with_field(cfg, name.split("."), value)
    return cfg


def _with_field(section, path: list[str], value):
    name, *deeper = path
    inner = _with_field(getattr(section, name), deeper, value) if deeper else value
    return dataclasses.replace(section, **{name: inner})


def kinds(cfg, prefix: str = "") -> dict[str, object]:
    """Nested dataclasses -> {"section.field": type}."""
    found = {}
    for name, kind in typing.get_type_hints(type(cfg)).items():
        nested = dataclasses.is_dataclass(kind)
        found |= kinds(getattr(cfg, name), f"{prefix}{name}.") if nested else {prefix + name: kind}
    return found


def words(kind) -> tuple[str, ...]:
    """The words that a value of the type, or each of its values, may be; none where anything of its type may be."""
    return typing.get_args(element(kind))


def element(kind):
    """The type of one value: of each value of a tuple, or of the tuples in it."""
    while typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    return kind


def _paths(values: dict[str, object]):
    for path in PATHS:
        value = values[path]
        for one in value if isinstance(value, tuple) else (value,):
            check_path(path, one)


def _patches(vision):
    size, patch = vision.image_size_px, vision.patch_size_px
    if size % patch:
        fitting = [p for p in range(1, size + 1) if size % p == 0]
        raise ConfigError(
            f"vision.image_size_px {size} is not a multiple of vision.patch_size_px {patch}: "
            f"patches of {', '.join(map(str, fitting))} px fit."
        )


def _heads(part: Transformer, name: str):
    if not part.head_dim and part.width % part.heads:
        raise ConfigError(
            f"{name}.width {part.width} is not a multiple of {name}.heads {part.heads}."
        )
    if part.heads % part.num_kv_heads:
        raise ConfigError(
            f"{name}.heads {part.heads} is not a multiple of {name}.kv_heads {part.kv_heads}."
        )


def _turns(decoder):
    if decoder.positions == "rope" and (
        decoder.rotary_dim % 2 or not 0 < decoder.rotary_dim <= decoder.head_width
    ):
        raise ConfigError(
            f"decoder.rope.fraction {decoder.rope.fraction} of a head of {decoder.head_width} is {decoder.rotary_dim} "
            "numbers: RoPE turns an even number of them, from 2 to all."
        )
