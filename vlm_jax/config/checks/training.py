"""Settings of training and validation that are refused together."""

import dataclasses
import re

from vlm_jax.config import (
    ConfigError,
    Experiment,
)
from vlm_jax.config.bounds import check_path
from vlm_jax.config.checks.common import NAME, NAME_CHARACTERS, is_changed

TRAINING = "train"  # prefix of the training's own metrics


def _parts(cfg: Experiment) -> list[str]:
    """Returns the parts of the model that have parameters."""
    vision, fusion = cfg.vision, cfg.fusion
    has_part = {
        "vision": fusion.has_images and (vision.has_encoder or vision.positions == "learned"),
        "projector": fusion.has_images and cfg.projector.kind != "none",
        "decoder": True,
        "cross_attention": fusion.image_in_memory,
    }
    return [part for part, is_present in has_part.items() if is_present]


def _rates(cfg: Experiment) -> None:
    parts = _parts(cfg)
    if not any(getattr(cfg.optim.lr_mult, part) for part in parts):
        raise ConfigError(
            f"optim.lr_mult is 0 for {', '.join(parts)}, all parts of the model: nothing would be "
            "trained."
        )


def _lora(cfg: Experiment) -> None:
    lora = cfg.lora
    if cfg.adapter and (not cfg.init_from or cfg.init_parts):
        raise ConfigError(
            f"adapter {cfg.adapter} needs its whole base model: set init_from to its folder, and "
            "leave init_parts out."
        )
    if lora.rank is None:
        for field in dataclasses.fields(lora):
            if is_changed(lora, field.name):
                raise ConfigError(
                    f"lora.{field.name} has no effect without lora.rank: set lora.rank, or leave "
                    f"lora.{field.name} out."
                )
    elif not lora.targets:
        raise ConfigError("lora.rank needs lora.targets, such as decoder: it is empty.")
    distinct = {target.name: target for target in lora.parsed_targets}
    for target in lora.parsed_targets:
        if target != distinct[target.name]:
            raise ConfigError(
                f"lora.targets gives {target.name} two ranks or alphas: leave one out."
            )
        part = target.name.split(".")[0]
        if getattr(cfg.optim.lr_mult, part, None) == 0:
            raise ConfigError(
                f"optim.lr_mult.{part} 0 trains no adapter of lora.targets {target.name}: set it "
                "above 0; the kernels stay frozen."
            )


def _frozen(cfg: Experiment) -> None:
    is_any_frozen = not all(getattr(cfg.optim.lr_mult, part) for part in _parts(cfg))
    if cfg.train.frozen_dtype is not None and cfg.lora.rank is None and not is_any_frozen:
        raise ConfigError(
            f"train.frozen_dtype {cfg.train.frozen_dtype} has no effect, because all parts are "
            "trained: set lora.rank, or optim.lr_mult.PART to 0, or leave it out."
        )
    if not cfg.train.double_quantization and cfg.train.frozen_dtype != "nf4":
        raise ConfigError(
            "train.double_quantization False has no effect without train.frozen_dtype nf4: leave "
            "it out."
        )


def _microbatches(cfg: Experiment) -> None:
    if cfg.train.batch_size % cfg.train.microbatches:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not divisible by "
            f"train.microbatches {cfg.train.microbatches}."
        )


def _profile(cfg: Experiment) -> None:
    profile, steps = cfg.train.profile_steps, cfg.train.steps
    if not profile:
        return
    is_range = re.fullmatch(r"[1-9][0-9]{0,8}:[1-9][0-9]{0,8}", profile)
    if not is_range or not cfg.train.profiled:
        raise ConfigError(
            f"train.profile_steps {profile!r} is not a range of steps: write FIRST:LAST, "
            "such as 10:13."
        )
    if cfg.train.profiled[-1] > steps:
        raise ConfigError(f"train.profile_steps {profile} ends after train.steps {steps}.")


def _validation(cfg: Experiment) -> None:
    """Checks the fields of validation; `infer/metrics/scores.py` checks train.best_metric."""
    entries, every_steps = cfg.eval.splits, cfg.eval.every_steps
    if every_steps is None:
        for name in ("eval.splits", "train.best_metric", "train.patience"):
            section, _, field = name.partition(".")
            value = getattr(getattr(cfg, section), field)
            if value not in (None, ()):
                raise ConfigError(
                    f"{name} has no effect without validation: set eval.every_steps, or leave "
                    f"{name} out."
                )
        return
    if not entries:
        raise ConfigError(
            f"eval.every_steps {every_steps} needs a split to validate on: set eval.splits, such "
            "as val=train[90%:] with data.train_split train[:90%]."
        )
    names = [entry.partition("=")[0] for entry in entries]
    for name, entry in zip(names, entries, strict=True):
        if not NAME.fullmatch(name) or entry.endswith("="):
            raise ConfigError(
                f"eval.splits {entry!r} is not NAME=SPLIT, such as val=train[90%:]: "
                f"{NAME_CHARACTERS}."
            )
        if name == TRAINING:
            raise ConfigError(
                f"eval.splits {entry!r} has the name of the training's own metrics: choose another "
                f"name, such as train_part={entry.partition('=')[2] or entry}."
            )
        if names.count(name) > 1:
            raise ConfigError(f"eval.splits names {name} twice: choose another name.")
    if "files" in cfg.data.dataset.fields:
        for split in cfg.eval.named_splits.values():
            check_path("eval.splits", split)


CHECKS = (_rates, _lora, _frozen, _microbatches, _profile, _validation)
