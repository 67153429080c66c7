"""Bounds of an experiment's numbers and paths; a field without a row may have any value."""

import math
import numbers
import operator
import re
from collections.abc import Callable

from vlm_jax.config import ConfigError
from vlm_jax.config.model import PRETRAINED_PARTS


def _for_stacks(**limits: float) -> dict[str, float]:
    """Returns the same bounds for the encoder and for the decoder."""
    return {
        f"{stack}.{field}": limit
        for stack in ("vision", "decoder")
        for field, limit in limits.items()
    }


AT_LEAST = {
    "data.questions_per_row": 1,
    "data.text_length": 1,
    "data.images_per_row": 1,
    "data.patches_per_row": 1,
    "data.image_px": 64,
    "data.seed": 0,
    # Typewritten letters are legible from this size.
    "data.cell_px": 6,
    "data.fold": 0,
    # A lower one would leave nothing of the smaller sources.
    "data.mixture_temperature": 0.1,
    "data.bos_id": 0,
    "data.threads": 0,
    "data.prefetch": 0,
    **_for_stacks(width=1, depth=1, heads=1, mlp_width=1, kv_heads=1, head_dim=1, unroll=1),
    "vision.image_size_px": 1,
    "vision.patch_size_px": 1,
    "vision.resize_px": 1,
    "vision.max_patches": 1,
    "vision.patch_square": 1,
    "vision.patch_frames": 1,
    "vision.window_patches": 1,
    "vision.classes": 1,
    "vision.registers": 0,
    "vision.tiles": 1,
    "vision.max_map_tiles": 1,
    "vision.num_global_layers": 0,
    "projector.factor": 1,
    "projector.mlp_width": 1,
    "projector.queries": 1,
    "projector.depth": 1,
    "projector.heads": 1,
    "projector.head_dim": 1,
    "projector.width": 1,
    "projector.block_mlp_width": 1,
    "projector.cross_every": 1,
    "fusion.cross_every": 1,
    "decoder.vocab_size": 1,
    "decoder.extra_tokens": 0,
    "decoder.added_tokens": 0,
    "decoder.max_positions": 1,
    "decoder.position_offset": 0,
    "decoder.sliding_window": 1,
    "lora.rank": 1,
    "lora.dropout": 0,
    "optim.learning_rate": 0,
    "optim.lr_mult.vision": 0,
    "optim.lr_mult.projector": 0,
    "optim.lr_mult.decoder": 0,
    "optim.lr_mult.cross_attention": 0,
    "optim.gate_lr_mult": 0,
    "optim.warmup_steps": 0,
    "optim.beta1": 0,
    "optim.beta2": 0,
    "optim.final_lr_fraction": 0,
    "optim.weight_decay": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.microbatches": 1,
    "train.loss_chunk": 1,
    "train.checkpoint_every_steps": 1,
    "train.keep_checkpoints": 1,
    "train.keep_best": 0,
    "train.patience": 1,
    "train.keep_every_steps": 1,
    "train.log_every_steps": 1,
    "distributed.num_processes": 1,
    "distributed.process_id": 0,
    "distributed.timeout_seconds": 1,
    "distributed.heartbeat_seconds": 10,
    "eval.max_examples": 1,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
    "eval.every_steps": 1,
    "eval.during_examples": 0,
    "seed": 0,
}
ABOVE = {
    "lora.alpha": 0,
    "optim.clip_norm": 0,
    "decoder.logit_softcap": 0,
    "vision.image_std": 0,
    "vision.rope.theta": 0,
    "decoder.rope.theta": 0,
    "decoder.rope.local_theta": 0,
    "decoder.rope.factor": 0,
    "projector.norm_eps": 0,
    **_for_stacks(norm_eps=0, query_scale=0, score_softcap=0),
}
AT_MOST = {
    "data.threads": 256,
    "data.image_px": 448,
    "data.seed": 2**32 - 1,
    # Up to here the longest words fit into the lines of a page of any size.
    "data.cell_px": 8,
    "data.fold": 1,
    "data.prefetch": 10_000,
    "distributed.num_processes": 2**20,
    "distributed.timeout_seconds": 86_400,
    "distributed.heartbeat_seconds": 86_400,
    # Far above any useful one; much higher ones overflow float32 in one step.
    "optim.learning_rate": 1000,
    "optim.final_lr_fraction": 1,
    "seed": 2**32 - 1,
    # Far above all published models: a config.json may hold any number, and its model is traced.
    **_for_stacks(
        width=2**20, depth=4096, heads=2**16, mlp_width=2**22, kv_heads=2**16, head_dim=2**16
    ),
    "projector.mlp_width": 2**22,
    "projector.norm_eps": 1,
    "projector.queries": 2**20,
    "projector.depth": 4096,
    "projector.heads": 2**16,
    "projector.head_dim": 2**16,
    "projector.width": 2**20,
    "projector.block_mlp_width": 2**22,
    **_for_stacks(norm_eps=1, score_softcap=1e6),
    "vision.image_size_px": 2**14,
    "vision.patch_size_px": 2**14,
    "vision.resize_px": 2**14,
    "vision.max_patches": 2**24,
    "vision.patch_square": 2**8,
    "vision.patch_frames": 64,
    "vision.window_patches": 2**14,
    "vision.classes": 2**24,
    "vision.registers": 2**16,
    "vision.tiles": 2**10,
    "vision.max_map_tiles": 2**10,
    "vision.num_global_layers": 4096,
    "decoder.vocab_size": 2**24,
    "decoder.extra_tokens": 2**24,
    "decoder.added_tokens": 2**24,
    "decoder.max_positions": 2**24,
    "decoder.position_offset": 2**24,
    "decoder.sliding_window": 2**31 - 1,
    "decoder.logit_softcap": 1e6,
    "vision.rope.theta": 1e12,
    "decoder.rope.theta": 1e12,
    "decoder.rope.original_positions": 2**24,
}
BELOW = {"lora.dropout": 1, "optim.beta1": 1, "optim.beta2": 1}
PATHS = (
    "workdir",
    "init_from",
    "adapter",
    "data.dir",
    "data.files",
    "data.image_dir",
    "eval.files",
    *(f"{part}.checkpoint" for part in PRETRAINED_PARTS),
    "train.compilation_cache_dir",
)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# NaN compares as false, so each of these refuses it.
LIMITS = {
    "at least": (AT_LEAST, operator.ge),
    "above": (ABOVE, operator.gt),
    "at most": (AT_MOST, operator.le),
    "below": (BELOW, operator.lt),
}


def check_number(path: str, value: object, may_be_none: bool = False) -> None:
    """Checks the value of a field `section.field`, or each of its values.

    Other values than numbers pass.

    Raises:
      ConfigError: the number is outside its bounds or not finite.
    """
    if value is None:
        return
    if isinstance(value, tuple):
        for element in value:
            check_number(path, element)
        return
    otherwise = ", or None" if may_be_none else ""
    for relation, (limits, holds) in LIMITS.items():
        if path in limits and not holds(value, limits[path]):
            raise ConfigError(
                f"{path} is {value}: it must be {relation} {limits[path]}{otherwise}."
            )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}: it must be a finite number{otherwise}.")


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    named: Callable[[str], str] = lambda option: option,
) -> None:
    """Checks the fields of `infer.generate.SamplingParams`.

    Args:
      named: spells an option in messages, such as --top-k for top_k.

    Raises:
      ConfigError: an option is not a number, or out of range.
    """
    whole = {"max_new_tokens": max_new_tokens, "top_k": top_k, "seed": seed}
    for option, value in whole.items():
        # True is an Integral.
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ConfigError(f"{named(option)} {value!r}: it must be a whole number.")
    for option, value in {"temperature": temperature, "top_p": top_p}.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise ConfigError(f"{named(option)} {value!r}: it must be a number.")
    at_least = {
        "max_new_tokens": (max_new_tokens, 1),
        "temperature": (temperature, 0),
        "top_k": (top_k, 0),
        "seed": (seed, 0),
    }
    for option, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"{named(option)} {value}: it must be at least {least}.")
    if not math.isfinite(temperature):
        raise ConfigError(f"{named('temperature')} {temperature}: it must be a finite number.")
    if seed > AT_MOST["seed"]:
        raise ConfigError(f"{named('seed')} {seed}: it must be at most {AT_MOST['seed']}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{named('top_p')} {top_p}: it must be above 0 and at most 1.")


def check_path(path: str, value: str) -> None:
    """Raises ConfigError for the value of a field that is a URL such as gs://bucket/run."""
    if URL.match(value):
        raise ConfigError(
            f"{path} {value} is a URL, not a local path: mount the bucket, for instance with "
            "gcsfuse, and give the path below its mount point."
        )
