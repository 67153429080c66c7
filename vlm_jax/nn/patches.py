"""Images -> patches -> tokens with positions."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.config import Vision
from vlm_jax.nn.layers import Dense, embedding_init


def patchify(
    images: Float[Array, "B height width channels"], patch_size_px: int
) -> Float[Array, "B P C"]:
    """Cuts images into flattened patches, row by row: 9 patches of 16x16x3 give (1, 9, 768)."""
    return einops.rearrange(
        images, "B (h p) (w q) c -> B (h w) (p q c)", p=patch_size_px, q=patch_size_px
    )


def whole_patches(
    images: Float[Array, "B height width channels"], patch_size_px: int
) -> Float[Array, "B h w channels"]:
    """Without the pixels at the right and lower border that fill no patch; a strided convolution does not read them."""
    height, width = (side // patch_size_px * patch_size_px for side in images.shape[1:3])
    return images[:, :height, :width]


def linear_from_conv(kernel: Float[Array, "p q c D"]) -> Float[Array, "C D"]:
    """The weights of a strided convolution as those of a product over flattened patches."""
    return einops.rearrange(kernel, "p q c D -> (p q c) D")


def conv_from_linear(kernel: Float[Array, "C D"], patch_size_px: int) -> Float[Array, "p q c D"]:
    return einops.rearrange(kernel, "(p q c) D -> p q c D", p=patch_size_px, q=patch_size_px)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """(P, D): sines and cosines of row and column, a quarter of the width each (as in MoCo v3 and big_vision)."""
    rows, columns = (axis.reshape(-1, 1) for axis in np.mgrid[: grid[0], : grid[1]])
    quarter = width // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / max(quarter - 1, 1))
    parts = [f(axis * frequencies) for axis in (columns, rows) for f in (np.sin, np.cos)]
    return np.pad(np.concatenate(parts, axis=1), ((0, 0), (0, width - 4 * quarter))).astype(
        np.float32
    )


def resample_positions(
    table: Float[Array, "P D"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Array, "R D"]:
    """A table of learned positions on another grid, by bicubic interpolation.

    Keys' cubic kernel with a = -0.75 at half-pixel centres, clamped at the border and without antialiasing, as
    PyTorch's `interpolate(mode="bicubic")` and so every public checkpoint; `jax.image.resize` uses a = -0.5.
    """
    if old == new:
        return table
    grid = table.reshape(*old, -1)
    grid = jnp.einsum("rh,hwd->rwd", _cubic_weights(old[0], new[0]), grid)
    return jnp.einsum("cw,rwd->rcd", _cubic_weights(old[1], new[1]), grid).reshape(
        new[0] * new[1], -1
    )


def _cubic_weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """(new, old): how much of each old cell every new cell takes; four taps a row."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        cell = np.floor(centre).astype(int) + tap
        d = np.abs(centre - cell)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        np.add.at(
            weights,
            (np.arange(new), np.clip(cell, 0, old - 1)),
            np.where(d <= 1, near, np.where(d < 2, far, 0)),
        )
    return weights.astype(np.float32)


class PatchEmbed(nn.Module):
    """(B, height, width, channels) -> (B, P, D), as a product over flattened patches or the equal strided convolution.

    ViT (Dosovitskiy et al. 2021), eq. 1. The weights of both are kept as (C, D), so that one loads into the other.
    Patches that are cut already, (B, P, C), pass where there is no encoder.
    """

    cfg: Vision

    @nn.compact
    def __call__(self, images: Float[Array, "B *dims"]) -> Float[Array, "B P D"]:
        cfg, patch = self.cfg, self.cfg.patch_size_px
        if images.ndim == 3:
            return images
        if cfg.kind == "none":
            tokens = patchify(images, patch)
        elif cfg.patch_embed == "linear":
            tokens = Dense(
                "C D", (cfg.patch_dim, cfg.width), bias=cfg.patch_bias, name="projection"
            )(patchify(whole_patches(images, patch), patch))
        else:
            tokens = _Convolution(cfg, name="projection")(images)
        grid = images.shape[1] // patch, images.shape[2] // patch
        if cfg.positions == "none":
            return tokens
        return tokens + self._positions(grid, tokens.shape[-1]).astype(tokens.dtype)

    def _positions(self, grid, width):
        cfg = self.cfg
        if cfg.positions == "sincos":
            return jnp.asarray(sincos_positions(grid, width))
        shape = (cfg.grid[0] * cfg.grid[1], width)
        table = self.param("positions", axes.with_axes(embedding_init, "P D"), shape)
        return resample_positions(table, cfg.grid, grid)


class _Convolution(nn.Module):
    cfg: Vision

    @nn.compact
    def __call__(self, images):
        cfg, patch = self.cfg, self.cfg.patch_size_px
        kernel = self.param(
            "kernel",
            axes.with_axes(nn.initializers.lecun_normal(), "C D"),
            (cfg.patch_dim, cfg.width),
        )
        tokens = jax.lax.conv_general_dilated(
            images,
            conv_from_linear(kernel, patch),
            window_strides=(patch, patch),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if cfg.patch_bias:
            tokens += self.param("bias", axes.with_axes(nn.initializers.zeros, "D"), (cfg.width,))
        return einops.rearrange(tokens, "B h w D -> B (h w) D")
