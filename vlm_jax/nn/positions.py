"""Position embeddings: rotary (RoPE) of tokens and of patches, and sinusoidal."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.config import Decoder, PatchRope, Rope, Vision
from vlm_jax.nn import longrope

RopeTables = tuple[Float[Array, "#B S R"], Float[Array, "#B S R"]]  # cosines and sines


def rope_tables(positions: Int[Array, "B S *axes"], cfg: Decoder) -> RopeTables:
    """Cosines and sines of RoPE (Su et al. 2021, eq. 34), the two halves of R side by side.

    With `rope.sections`, `positions` (B, S, 3) are time, row and column (M-RoPE).
    """
    inv_freq = _inv_freq(cfg, cfg.rope.theta)
    if positions.ndim == 3:
        return _tables(positions[..., _axes_of_frequencies(cfg.rope)], inv_freq)
    if cfg.rope.scaling == "longrope":
        inv_freq = longrope.scale_inv_freq(inv_freq, positions, cfg.rope)
        return _tables(positions[..., None], inv_freq, longrope.attention_factor(cfg.rope))
    return _tables(positions[..., None], ROPE_SCALING[cfg.rope.scaling](inv_freq, cfg.rope))


def _axes_of_frequencies(rope: Rope) -> Int[np.ndarray, "half"]:
    """Position that each frequency rotates with: 0, 1, 2 for time, row, column.

    With `rope.interleaved`, 0 1 2 0 1 2 ... as far as row and column have frequencies, then 0.
    """
    if not rope.interleaved:
        return np.repeat(np.arange(3), rope.sections)
    axes = np.zeros(sum(rope.sections), int)
    for axis in (1, 2):
        axes[axis : 3 * rope.sections[axis] : 3] = axis
    return axes


def local_rope_tables(positions: Int[Array, "B S"], cfg: Decoder) -> RopeTables:
    """RoPE with `rope.local_theta` and without scaling, for the sliding blocks of Gemma 3."""
    return _tables(positions[..., None], _inv_freq(cfg, cfg.rope.local_theta))


def _inv_freq(cfg: Decoder, theta: float) -> Float[np.ndarray, "half"]:
    """R / 2 inverse frequencies in radians per position, from 1 down to almost 1 / theta."""
    exponents = -np.arange(0, cfg.rotary_dim, 2) / cfg.rotary_dim
    return np.float32(theta**exponents)


def _tables(positions, inv_freq, scale=1.0):
    return _cosines_and_sines(positions.astype(jnp.float32) * inv_freq, scale)


def _cosines_and_sines(angles, scale=1.0):
    """(B, S, R / 2) -> 2 x (B, S, R)."""
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _scale_llama3(inv_freq, rope: Rope):
    """Scales low frequencies by 1 / factor, keeps high ones and interpolates in between.

    Llama 3.1; transformers, modeling_rope_utils.py.
    """
    # Periods of each frequency in a text of the original length.
    periods = rope.original_positions * inv_freq / (2 * math.pi)
    # 1: the frequency is kept; 0: it is divided by the factor.
    weight = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    weight = np.clip(weight, 0, 1).astype(np.float32)
    return inv_freq * (weight + (1 - weight) / np.float32(rope.factor))


# By `rope.scaling`. `longrope` is not a row: its frequencies depend on the positions.
ROPE_SCALING = {
    "none": lambda inv_freq, rope: inv_freq,
    "dynamic": lambda inv_freq, rope: inv_freq,
    "linear": lambda inv_freq, rope: inv_freq / np.float32(rope.factor),
    "llama3": _scale_llama3,
}


def patch_coordinates(places, grids, rope: PatchRope):
    """Coordinates of patches, as `patch_rope_tables` takes them.

    Args:
      places: (..., 2) row and column of each patch, in NumPy or JAX.
      grids: (..., 2) rows and columns of its image.
    """
    if rope.coordinates == "index":
        return places.astype(np.float32)
    centers = (places + np.float32(0.5)) / grids.astype(np.float32)
    return 2 * np.float32(np.pi) * (2 * centers - 1)


def patch_rope_tables(coordinates: Float[Array, "B P 2"], cfg: Vision) -> RopeTables:
    """Cosines and sines of 2-D RoPE: in each half of R, frequencies of rows, then of columns.

    Tokens with coordinates of 0, such as a class token, are not rotated.
    """
    inv_freq = cfg.rope.theta ** (-np.arange(0, cfg.head_width, 2) / cfg.head_width)
    inv_freq = np.float32(inv_freq)  # (H / 2,)
    of_rows = inv_freq[::2]
    of_columns = inv_freq[1::2] if cfg.rope.kind == "alternate" else of_rows
    inv_freq = np.stack([of_rows, of_columns])  # (2, H / 4)
    angles = coordinates[..., None].astype(jnp.float32) * inv_freq  # (B, P, 2, H / 4)
    angles = angles.reshape(*angles.shape[:2], -1)
    return _cosines_and_sines(angles)


def continued_rope_positions(last: Int[Array, "B S 3"], steps) -> Int[Array, "B S 3"]:
    """Positions of M-RoPE `steps` tokens of text after tokens, such as the last of a prompt.

    Args:
      last: of NumPy or JAX.
      steps: a number, or one for each of S.
    """
    steps = steps[:, None] if np.ndim(steps) else steps
    return last.max(axis=-1, keepdims=True) + steps + np.zeros(3, np.int32)


def sinusoidal_embedding(rows: Int[Array, "B S"], width: int) -> Float[Array, "B S D"]:
    """Sines, then cosines, of D / 2 frequencies (fairseq's form of Vaswani et al. 2017, 3.5)."""
    half = width // 2
    inv_freq = np.exp(-np.arange(half) * math.log(10_000.0) / (half - 1)).astype(np.float32)
    angles = rows[..., None].astype(jnp.float32) * inv_freq
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
