"""Speed of greedy generation in bfloat16: time to the first token, and tokens per second."""

import functools
import math
from collections.abc import Callable

import jax
import turns
from on_device import models

from vlm_jax.cost.chips import find_chip
from vlm_jax.infer.generate import SamplingParams, generate

ROWS = (1, 32)
PROMPT_TEXT, NEW_TOKENS = 64, 128
SECONDS = 3.0  # of timed calls; a tiny model takes as few as it can


class Speed:
    """Generation with a model for prompts of one image and `PROMPT_TEXT` tokens."""

    def __init__(self, kind: str, size: str):
        self.cfg = models.experiment(kind, size)
        is_tiny = size == "tiny"
        self.new_tokens = 8 if is_tiny else NEW_TOKENS
        self.timed_seconds = 0.0 if is_tiny else SECONDS

    def tasks(self) -> dict[str, Callable[[], dict]]:
        return {f"batch {rows}": functools.partial(self.measure, rows) for rows in ROWS}

    @functools.cached_property
    def params(self):
        return models.random_params(self.cfg, "bfloat16")

    def measure(self, rows: int) -> dict:
        prompt = models.prompt_batch(self.cfg, rows, PROMPT_TEXT)
        prompt = prompt.replace(images=prompt.images.astype("bfloat16"))

        def seconds(new_tokens: int) -> float:
            def run():
                tokens = generate(self.cfg.model, self.params, prompt, new_tokens, SamplingParams())
                return tokens.block_until_ready()

            return turns.times(run, self.timed_seconds)["seconds"]

        first, whole = seconds(1), seconds(self.new_tokens)
        token_seconds = (whole - first) / (self.new_tokens - 1)
        params_bytes = sum(x.nbytes for x in jax.tree.leaves(self.params["decoder"]))
        chip = find_chip(jax.devices()[0].device_kind)
        peak = chip.hbm_bytes_per_second if chip else math.nan
        return {
            "prompt tokens": prompt.tokens.shape[1],
            "seconds to the first token": first,
            "ms per further token": 1e3 * token_seconds,
            "tokens/s": rows / token_seconds,
            "share of memory rate, weights alone": params_bytes / token_seconds / peak,
        }
