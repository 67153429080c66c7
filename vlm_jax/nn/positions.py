"""Positions of tokens: rotary embedding, whole or stretched to longer texts, and fixed sines."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.config import Decoder, Rope

Tables = tuple[Float[Array, "B S R"], Float[Array, "B S R"]]  # cosines and sines


def rope_tables(positions: Int[Array, "B S"], cfg: Decoder) -> Tables:
    """Cosines and sines of rotary position embedding (Su et al. 2021, eq. 34), halves side by side as in Llama."""
    inv_freq = _inv_freq(cfg)
    if cfg.rope.scaling == "longrope":
        is_long = positions.max() + 1 > cfg.rope.original_positions
        short, long = (
            inv_freq / np.float32(x) for x in (cfg.rope.short_factors, cfg.rope.long_factors)
        )
        return _tables(positions, jnp.where(is_long, long, short), _longrope_scale(cfg.rope))
    return _tables(positions, ROPE_SCALING[cfg.rope.scaling](inv_freq, cfg.rope))


def local_rope_tables(positions: Int[Array, "B S"], cfg: Decoder) -> Tables:
    """The same with `local_theta`, never stretched: for the sliding blocks of Gemma 3."""
    return _tables(positions, _inv_freq(cfg, cfg.rope.local_theta))


def _inv_freq(cfg: Decoder, theta: float = 0.0) -> Float[np.ndarray, "half"]:
    return np.float32(
        (theta or cfg.rope.theta) ** (-np.arange(0, cfg.rotary_dim, 2) / cfg.rotary_dim)
    )


def _tables(positions, inv_freq, scale=1.0):
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _llama3(inv_freq, rope: Rope):
    """Long waves are stretched, short ones stay, and between them it goes over (transformers, modeling_rope_utils)."""
    turns = (
        rope.original_positions * inv_freq / (2 * math.pi)
    )  # of each wave in the text of the first training
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = np.clip(share, 0, 1).astype(np.float32)
    return inv_freq * (share + (1 - share) / np.float32(rope.factor))


def _longrope_scale(rope: Rope) -> float:
    """The factor of cosines and sines, for short texts too (LongRoPE, Ding et al. 2024, as in Phi-3)."""
    return (
        math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions))
        if rope.factor > 1
        else 1.0
    )


ROPE_SCALING = {
    "none": lambda inv_freq, rope: inv_freq,
    "linear": lambda inv_freq, rope: inv_freq / np.float32(rope.factor),
    "llama3": _llama3,
}


def sinusoidal_embedding(rows: Int[Array, "B S"], width: int) -> Float[Array, "B S D"]:
    """Sines, then cosines, over D / 2 wavelengths from 1 to 10,000 (fairseq's form of Vaswani et al. 2017, 3.5)."""
    half = width // 2
    inv_freq = np.exp(-np.arange(half) * math.log(10_000.0) / (half - 1)).astype(np.float32)
    angles = rows[..., None].astype(jnp.float32) * inv_freq
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
