"""Generated tokens against full forward passes, without a KV cache and without fused kernels.

All prompts and their generated tokens are run once more as one sequence. Every generated token must
be the most likely one there; rounding may decide between tokens that are almost equally likely, so
that the difference of their logits is limited, in units of the standard deviation of the logits.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from on_device import models
from on_device.attention import plain_attention

from vlm_jax.config import Experiment
from vlm_jax.infer.generate import SamplingParams, generate
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import NO_IMAGE, Batch

ROWS, PADDING_STEP = 4, 2
# Largest difference, in standard deviations; a random token's is about 3.
LIMITS = {"bfloat16": 0.25, "float32": 0.02}


@dataclass(frozen=True)
class Lengths:
    text: int  # of a prompt, behind its image
    new: int
    window: int


LENGTHS = Lengths(text=60, new=64, window=128)
TINY_LENGTHS = Lengths(text=12, new=12, window=16)
SMALL = {"width": 512, "depth": 4, "heads": 8, "mlp_width": 1024}
# Name -> fusion style, prefix, and dtype; the prefix comes with sliding windows.
CASES = {
    "unified": ("unified", "causal", "bfloat16"),
    "prefix and windows": ("unified", "bidirectional", "bfloat16"),
    "cross_attention": ("cross_attention", "causal", "bfloat16"),
    "encoder_decoder": ("encoder_decoder", "causal", "bfloat16"),
    "hybrid": ("hybrid", "causal", "bfloat16"),
    "prefix and windows, float32": ("unified", "bidirectional", "float32"),
    "cross_attention, float32": ("cross_attention", "causal", "float32"),
}
TINY_CASES = ("prefix and windows",)


def tasks(is_tiny: bool) -> dict[str, Callable[[], dict]]:
    lengths = TINY_LENGTHS if is_tiny else LENGTHS
    return {
        name: functools.partial(check, experiment(is_tiny, kind, prefix), dtype, lengths)
        for name, (kind, prefix, dtype) in CASES.items()
        if not is_tiny or name in TINY_CASES
    }


def experiment(is_tiny: bool, kind: str, prefix: str) -> Experiment:
    """Returns an experiment with the images of 0.4 B, but a small decoder."""
    cfg = models.experiment(kind, "tiny" if is_tiny else "0.4B")
    decoder, lengths = cfg.decoder, TINY_LENGTHS if is_tiny else LENGTHS
    if not is_tiny:
        decoder = replace(decoder, **SMALL, kv_heads=4, vocab_size=8192)
    if prefix == "bidirectional":
        layers = tuple(range(0, decoder.depth, 2))
        decoder = replace(decoder, sliding_window=lengths.window, sliding_layers=layers)
    return replace(
        cfg,
        vision=replace(cfg.vision, depth=2),
        fusion=replace(cfg.fusion, prefix=prefix, cross_every=1),
        decoder=decoder,
    )


def check(cfg: Experiment, dtype: str, lengths: Lengths) -> dict:
    """Returns shares of equal tokens, and the largest difference of logits."""
    params = models.random_params(cfg, dtype)
    prompt = models.prompt_batch(cfg, ROWS, lengths.text, PADDING_STEP)
    prompt = prompt.replace(images=prompt.images.astype(dtype))
    # Products of float32 are of lower precision on accelerators, unless this is set.
    precision = "highest" if dtype == "float32" else None
    values, differences = {}, []
    with jax.default_matmul_precision(precision):
        tokens = generate(cfg.model, params, prompt, lengths.new, SamplingParams())
        whole = extend(prompt, tokens)
        for name, is_fused in (("without a cache", True), ("without fused kernels", False)):
            chosen, difference = score(cfg, params, whole, tokens, is_fused)
            values[f"equal {name}"] = float(jnp.mean(chosen == tokens))
            differences.append(difference)
    # NaN stays, and does not pass.
    largest, limit = float(np.max(differences)), LIMITS[dtype]
    return values | {"largest difference": largest, "limit": limit, "passed": largest <= limit}


def extend(prompt: Batch, tokens: jax.Array) -> Batch:
    """Returns the prompts followed by all new tokens but the last, as one sequence."""
    count = tokens.shape[1] - 1

    def repeat_last(x):
        return jnp.concatenate([x, jnp.repeat(x[:, -1:], count, axis=1)], axis=1)

    def append(x, values):
        values = jnp.broadcast_to(values, (len(x), count))
        return jnp.concatenate([x, values.astype(x.dtype)], axis=1)

    return prompt.replace(
        tokens=append(prompt.tokens, tokens[:, :-1]),
        positions=append(prompt.positions, prompt.positions[:, -1:] + 1 + jnp.arange(count)),
        segment_ids=repeat_last(prompt.segment_ids),
        image_token_index=append(prompt.image_token_index, jnp.array(NO_IMAGE)),
        image_mask=repeat_last(prompt.image_mask),
        block_ids=None if prompt.block_ids is None else append(prompt.block_ids, jnp.array(0)),
    )


@functools.partial(jax.jit, static_argnames=("cfg", "is_fused"))
def score(
    cfg: Experiment, params, whole: Batch, tokens: jax.Array, is_fused: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the most likely tokens, and how much less likely `tokens` are at most."""
    with nullcontext() if is_fused else plain_attention():
        logits = VLM(cfg.model).apply({"params": params}, whole).logits
    logits = logits[:, -tokens.shape[1] :].astype(jnp.float32)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    differences = (logits.max(-1) - own) / logits.std(-1)
    return logits.argmax(-1), differences.max()
