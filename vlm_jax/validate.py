"""Refuses an experiment that cannot work, with a sentence that names the fields and the way out."""

import dataclasses
import math
import operator
import typing

from vlm_jax.config import ConfigError, Experiment, Transformer

AT_LEAST = {  # smallest allowed value; a field in none of these tables may be anything of its type
    "data.questions_per_row": 1,
    "data.text_length": 1,
    "data.threads": 0,
    "data.prefetch": 0,
    "vision.image_size_px": 1,
    "vision.patch_size_px": 1,
    "vision.unroll": 1,
    "projector.factor": 1,
    "projector.queries": 1,
    "projector.depth": 1,
    "projector.heads": 1,
    "fusion.cross_every": 1,
    "decoder.max_positions": 1,
    "decoder.unroll": 1,
    "optim.learning_rate": 0,
    "optim.rate_scale.vision": 0,
    "optim.rate_scale.projector": 0,
    "optim.rate_scale.decoder": 0,
    "optim.rate_scale.cross_attention": 0,
    "optim.warmup_steps": 0,
    "optim.beta1": 0,
    "optim.beta2": 0,
    "optim.final_fraction": 0,
    "optim.weight_decay": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.checkpoint_every_steps": 1,
    "train.keep_checkpoints": 1,
    "train.log_every_steps": 1,
    "eval.max_examples": 0,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
    "seed": 0,
} | {
    f"{stack}.{field}": least
    for stack in ("vision", "decoder")
    for field, least in {"width": 1, "depth": 1, "heads": 1, "mlp_width": 1, "kv_heads": 0, "head_dim": 0}.items()
}
ABOVE = {"optim.clip_norm": 0, "vision.norm_eps": 0, "decoder.norm_eps": 0, "decoder.rope.theta": 0}
AT_MOST = {"optim.final_fraction": 1, "seed": 2**32 - 1}
BELOW = {"optim.beta1": 1, "optim.beta2": 1}
LIMITS = {  # a number that is none is in no order, so it is refused by each of them
    "at least": (AT_LEAST, operator.ge),
    "above": (ABOVE, operator.gt),
    "at most": (AT_MOST, operator.le),
    "below": (BELOW, operator.lt),
}


def validate(cfg: Experiment) -> Experiment:
    """Returns the experiment as it came.

    Raises:
      ConfigError: a value, or two together, cannot work.
    """
    check_types(cfg)
    values = flat(cfg)
    for path, kind in kinds(cfg).items():
        value, allowed = values[path], words(kind)
        wrong = [word for word in (value if isinstance(value, tuple) else (value,)) if allowed and word not in allowed]
        if wrong:
            raise ConfigError(f"{path} {wrong[0]!r} is no choice: choose {', '.join(allowed)}.")
    _numbers(values)
    for check in (_patches, _heads, _projector, _fusion, _room, _rates):
        check(cfg)
    return cfg


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
        return isinstance(value, tuple) and len(value) == len(of_each) and all(map(_fits, value, of_each))
    if kind in (int, float):
        return type(value) in (int, kind)  # True is no number
    return isinstance(value, str if words(kind) else kind)


def _called(kind) -> str:
    if typing.get_origin(kind) is tuple:
        of_each = typing.get_args(kind)
        number = "" if of_each[-1] is Ellipsis else f"{len(of_each)} "
        return f"a tuple of {number}{_called(of_each[0])}"
    return "str" if words(kind) else kind.__name__


def _numbers(values: dict[str, object]) -> None:
    for path, value in values.items():
        for said, (limits, holds) in LIMITS.items():
            if path in limits and not holds(value, limits[path]):
                raise ConfigError(f"{path} is {value}: it must be {said} {limits[path]}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path} is {value}: it must be a finite number.")


def flat(cfg, prefix: str = "") -> dict[str, object]:
    """Nested dataclasses -> {"section.field": value}."""
    found = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        nested = dataclasses.is_dataclass(value)
        found |= flat(value, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": value}
    return found


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


def _patches(cfg):
    size, patch = cfg.vision.image_size_px, cfg.vision.patch_size_px
    if size % patch and not cfg.vision.checkpoint:  # public ones may leave pixels over at the border
        fitting = [p for p in range(1, size + 1) if size % p == 0]
        raise ConfigError(
            f"vision.image_size_px {size} is not a multiple of vision.patch_size_px {patch}: "
            f"patches of {', '.join(map(str, fitting))} px fit."
        )


def _heads(cfg):
    def divides(part: Transformer, name):
        if not part.head_dim and part.width % part.heads:
            raise ConfigError(f"{name}.width {part.width} is not a multiple of {name}.heads {part.heads}.")
        if part.heads % part.num_kv_heads:
            raise ConfigError(f"{name}.heads {part.heads} is not a multiple of {name}.kv_heads {part.kv_heads}.")

    divides(cfg.decoder, "decoder")
    if cfg.vision.kind == "vit":
        divides(cfg.vision, "vision")
    if cfg.projector.kind == "resampler" and cfg.decoder.width % cfg.projector.heads:
        raise ConfigError(
            f"decoder.width {cfg.decoder.width} is not a multiple of projector.heads {cfg.projector.heads}."
        )
    turned = cfg.decoder.turned
    if cfg.decoder.positions == "rope" and (turned % 2 or not 0 < turned <= cfg.decoder.head_width):
        raise ConfigError(
            f"decoder.rope.fraction {cfg.decoder.rope.fraction} of a head of {cfg.decoder.head_width} is {turned} "
            "numbers: RoPE turns an even number of them, from 2 to all."
        )


def _projector(cfg):
    projector, rows = cfg.projector, cfg.vision.grid[0]
    if projector.kind not in ("pixel_shuffle", "average_pool"):
        return
    if rows % projector.factor:
        raise ConfigError(
            f"projector.factor {projector.factor} does not divide the {rows} x {rows} patches of vision.image_size_px "
            f"{cfg.vision.image_size_px} and vision.patch_size_px {cfg.vision.patch_size_px}."
        )
    if cfg.vision.extra_tokens:
        raise ConfigError(
            f"projector.kind {projector.kind} needs a grid: set vision.keep_class_token to False, or choose "
            "linear, mlp or resampler."
        )


def _fusion(cfg):
    fusion = cfg.fusion
    if cfg.vision.newline_token and not fusion.image_in_sequence:
        raise ConfigError(
            f"vision.newline_token True stands in the token sequence, where fusion.kind {fusion.kind} puts no image: "
            "set it to False, or choose fusion.kind unified."
        )
    if fusion.image_in_memory and cfg.vision.kind == "none" and cfg.vision.positions == "none":
        raise ConfigError(
            f"vision.kind none with vision.positions none leaves fusion.kind {fusion.kind} no order of the patches: "
            "set vision.positions to learned or sincos, or choose fusion.kind unified."
        )
    unread = [name for name in ("cross_every", "cross_layers", "gated") if _is_changed(fusion, name)]
    if unread and fusion.kind != "cross_attention":
        raise ConfigError(
            f"fusion.{unread[0]} {getattr(fusion, unread[0])} is of fusion.kind cross_attention: with fusion.kind "
            f"{fusion.kind} leave it out, or choose that kind."
        )
    if fusion.cross_layers and _is_changed(fusion, "cross_every"):
        raise ConfigError(
            f"fusion.cross_every {fusion.cross_every} and fusion.cross_layers {list(fusion.cross_layers)} both say "
            "where the cross blocks stand: leave one of them out."
        )
    outside = [i for i in fusion.cross_layers if not 0 <= i <= cfg.decoder.depth]
    if outside:
        raise ConfigError(
            f"fusion.cross_layers {outside} are not among the blocks 0 to {cfg.decoder.depth - 1} of decoder.depth "
            f"{cfg.decoder.depth}, nor {cfg.decoder.depth} (after the last)."
        )
    if fusion.prefix == "bidirectional" and cfg.data.questions_per_row > 1:
        raise ConfigError(
            f"fusion.prefix bidirectional lets an image see its question, so data.questions_per_row "
            f"{cfg.data.questions_per_row} questions cannot share one: set it to 1, or fusion.prefix to causal."
        )


def _is_changed(fusion, name: str) -> bool:
    return getattr(fusion, name) != getattr(type(fusion)(), name)


def _room(cfg):
    longest = cfg.row_length
    if longest > cfg.decoder.max_positions:
        raise ConfigError(
            f"decoder.max_positions {cfg.decoder.max_positions} has no room for the {cfg.image_slots_in_row} image "
            f"tokens of a row and data.text_length {cfg.data.text_length}: it must be at least {longest}."
        )


def _rates(cfg):
    if not any(flat(cfg.optim.rate_scale).values()):
        raise ConfigError(f"optim.rate_scale is 0 for {', '.join(flat(cfg.optim.rate_scale))}: nothing would learn.")
