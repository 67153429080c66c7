"""The numbers and paths that the fields of an experiment may have; one in none of the tables may be any of its type."""

import math
import operator
import re
from collections.abc import Callable

from vlm_jax.config import ConfigError


def _of_stacks(**limits: float) -> dict[str, float]:
    """The same for the encoder and for the decoder."""
    return {
        f"{stack}.{field}": limit
        for stack in ("vision", "decoder")
        for field, limit in limits.items()
    }


AT_LEAST = {
    "data.questions_per_row": 1,
    "data.text_length": 1,
    "data.images_per_row": 1,
    "data.image_px": 64,
    "data.seed": 0,
    "data.cell_px": 0,
    "data.bos_id": -1,
    "data.threads": 0,
    "data.prefetch": 0,
    **_of_stacks(
        width=1, depth=1, heads=1, mlp_width=1, kv_heads=0, head_dim=0, score_softcap=0, unroll=1
    ),
    "vision.image_size_px": 1,
    "vision.patch_size_px": 1,
    "vision.resize_px": 0,
    "vision.classes": 0,
    "vision.tiles": 1,
    "vision.num_global_layers": 0,
    "projector.factor": 1,
    "projector.queries": 1,
    "projector.depth": 1,
    "projector.heads": 1,
    "fusion.cross_every": 1,
    "decoder.vocab_size": 1,
    "decoder.extra_tokens": 0,
    "decoder.max_positions": 1,
    "decoder.position_offset": 0,
    "decoder.sliding_window": 0,
    "decoder.logit_softcap": 0,
    "optim.learning_rate": 0,
    "optim.lr_mult.vision": 0,
    "optim.lr_mult.projector": 0,
    "optim.lr_mult.decoder": 0,
    "optim.lr_mult.cross_attention": 0,
    "optim.warmup_steps": 0,
    "optim.beta1": 0,
    "optim.beta2": 0,
    "optim.final_lr_fraction": 0,
    "optim.weight_decay": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.microbatches": 1,
    "train.loss_chunk": 0,
    "train.checkpoint_every_steps": 1,
    "train.keep_checkpoints": 1,
    "train.keep_best": 0,
    "train.keep_every_steps": 0,
    "train.log_every_steps": 1,
    "distributed.num_processes": 0,
    "distributed.process_id": -1,
    "distributed.timeout_seconds": 1,
    "distributed.heartbeat_seconds": 10,
    "eval.max_examples": 0,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
    "seed": 0,
}
ABOVE = {
    "optim.clip_norm": 0,
    "decoder.rope.theta": 0,
    "decoder.rope.factor": 0,
    **_of_stacks(norm_eps=0),
}
AT_MOST = {
    "data.threads": 256,
    "data.image_px": 448,
    "data.seed": 2**32 - 1,
    "data.cell_px": 8,  # then the longest words, as many as a page of any size has, find room in its lines
    "data.prefetch": 10_000,
    "distributed.num_processes": 2**20,
    "distributed.timeout_seconds": 86_400,
    "distributed.heartbeat_seconds": 86_400,
    "optim.learning_rate": 1000,  # far above any that learns; much higher ones leave float32 in a step
    "optim.final_lr_fraction": 1,
    "seed": 2**32 - 1,
    # Of models, far above all that were published: a config.json can say anything, and its model is traced at once.
    **_of_stacks(
        width=2**20, depth=4096, heads=2**16, mlp_width=2**22, kv_heads=2**16, head_dim=2**16
    ),
    **_of_stacks(norm_eps=1, score_softcap=1e6),
    "vision.image_size_px": 2**14,
    "vision.patch_size_px": 2**14,
    "vision.resize_px": 2**14,
    "vision.classes": 2**24,
    "vision.tiles": 2**10,
    "vision.num_global_layers": 4096,
    "decoder.vocab_size": 2**24,
    "decoder.extra_tokens": 2**24,
    "decoder.max_positions": 2**24,
    "decoder.position_offset": 2**24,
    "decoder.sliding_window": 2**31 - 1,
    "decoder.logit_softcap": 1e6,
    "decoder.rope.theta": 1e12,
    "decoder.rope.original_positions": 2**24,
}
BELOW = {"optim.beta1": 1, "optim.beta2": 1}
PATHS = (
    "workdir",
    "init_from",
    "data.dir",
    "data.files",
    "data.image_dir",
    "eval.files",
    *(f"{part}.checkpoint" for part in ("vision", "projector", "decoder")),
    "train.compilation_cache_dir",
)
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
LIMITS = {  # a number that is none is in no order, so it is refused by each of them
    "at least": (AT_LEAST, operator.ge),
    "above": (ABOVE, operator.gt),
    "at most": (AT_MOST, operator.le),
    "below": (BELOW, operator.lt),
}


def check_numbers(values: dict[str, object]) -> None:
    """Raises ConfigError for a value, by its field `section.field`, that is outside its limits or no finite number."""
    for path, value in values.items():
        for said, (limits, holds) in LIMITS.items():
            if path in limits and not holds(value, limits[path]):
                raise ConfigError(f"{path} is {value}: it must be {said} {limits[path]}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path} is {value}: it must be a finite number.")


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    named: Callable[[str], str] = lambda option: option,
) -> None:
    """Raises ConfigError for an option of `infer.generate.SamplingParams` that is out of range; `named` spells its name."""
    at_least = {
        "max_new_tokens": (max_new_tokens, 1),
        "temperature": (temperature, 0),
        "top_k": (top_k, 0),
    }
    for option, (value, least) in (at_least | {"seed": (seed, 0)}).items():
        if value < least:
            raise ConfigError(f"{named(option)} {value}: it must be at least {least}.")
    if not math.isfinite(temperature):
        raise ConfigError(f"{named('temperature')} {temperature}: it must be a finite number.")
    if seed > AT_MOST["seed"]:
        raise ConfigError(f"{named('seed')} {seed}: it must be at most {AT_MOST['seed']}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{named('top_p')} {top_p}: it must be above 0 and at most 1.")


def check_path(path: str, value: str) -> None:
    """Raises ConfigError for a value, by its field, that is an address such as gs://bucket/run."""
    if ADDRESS.match(value):
        raise ConfigError(
            f"{path} {value} is an address, where a path of the file system belongs: mount the bucket, for instance "
            "with gcsfuse, and name the path below it."
        )
