"""Answers to a batch of prompts: the same function for a run and for a public checkpoint."""

import jax
import numpy as np
from flax import linen as nn

from vlm_jax.config import ConfigError
from vlm_jax.config.bounds import check_sampling
from vlm_jax.infer.generate import NonFiniteLogits, SamplingParams, generate
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import Batch


def answer(
    model: nn.Module,
    params,
    processor,
    prompts: str | list[str],
    images=(),
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = True,
) -> list[str]:
    """`vlm_jax.generate`."""
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if not isinstance(model, VLM):
        raise ConfigError("the model is an encoder: it writes no text.")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts:
        return []
    batch = processor(prompts, images, chat=chat)
    rooms = model.cfg.decoder.max_positions - 1 - np.max(batch.positions, axis=1)
    if min(rooms) < 1:
        longest = prompts[int(np.argmin(rooms))]
        raise ConfigError(
            f"the prompt {longest[:40]!r} is too long: decoder.max_positions {model.cfg.decoder.max_positions} leaves "
            "no room for an answer."
        )
    lengths = np.minimum(max_new_tokens, rooms)
    how, texts = SamplingParams(processor.eos_ids, temperature, top_k, top_p), {}
    for length in np.unique(lengths):  # a long prompt does not shorten the answers to others
        rows = np.flatnonzero(lengths == length)
        part = batch if len(rows) == len(prompts) else _rows_of(batch, rows)
        try:
            made = generate(model.cfg, params, part, int(length), how, jax.random.key(seed))
        except NonFiniteLogits as error:
            raise error.about(prompts[rows[error.row]]) from None
        texts |= dict(zip(rows.tolist(), map(processor.decode, jax.device_get(made))))
    return [texts[row] for row in range(len(prompts))]


def _rows_of(batch: Batch, rows: np.ndarray) -> Batch:
    """Some rows of a batch, with the images of all."""
    images = {name: getattr(batch, name) for name in ("images", "tile_layouts", "tile_mask")}
    owners = (
        np.arange(len(batch.tokens), dtype=np.int32)
        if batch.image_rows is None
        else batch.image_rows
    )
    texts = batch.replace(**dict.fromkeys(images), image_rows=owners)
    return jax.tree.map(lambda x: x[rows], texts).replace(**images)
