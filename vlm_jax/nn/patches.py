"""Images -> patches -> tokens with position embeddings."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

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
    """Crops images at the right and bottom to whole patches, as a strided convolution does."""
    height = images.shape[1] // patch_size_px * patch_size_px
    width = images.shape[2] // patch_size_px * patch_size_px
    return images[:, :height, :width]


def linear_from_conv(kernel: Float[Array, "p q c D"]) -> Float[Array, "C D"]:
    """Kernel of a strided convolution -> kernel of the equal linear layer over patches."""
    return einops.rearrange(kernel, "p q c D -> (p q c) D")


def conv_from_linear(kernel: Float[Array, "C D"], patch_size_px: int) -> Float[Array, "p q c D"]:
    """Inverse of `linear_from_conv`."""
    return einops.rearrange(kernel, "(p q c) D -> p q c D", p=patch_size_px, q=patch_size_px)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """2-D sine-cosine position embeddings, (P, D), as in MoCo v3 and big_vision.

    A quarter of D each for sine and cosine of the column, then of the row; a remainder is 0.
    """
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1)  # (P, 1) each
    frequencies = _sincos_frequencies(width)
    x, y = columns * frequencies, rows * frequencies  # (P, D // 4)
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return np.pad(table, ((0, 0), (0, width - table.shape[1]))).astype(np.float32)


def _sincos_frequencies(width: int) -> np.ndarray:
    quarter = width // 4
    return 10_000.0 ** (-np.arange(quarter) / max(quarter - 1, 1))


def sincos_embedding(places: Int[Array, "B P 2"], width: int) -> Float[Array, "B P D"]:
    """`sincos_positions` of patches at any (row, column)."""
    frequencies = jnp.asarray(_sincos_frequencies(width), jnp.float32)
    y, x = (places[..., axis, None] * frequencies for axis in (0, 1))
    table = jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, width - table.shape[-1])))


def resample_positions(
    table: Float[Array, "P D"], old: tuple[int, int], new: tuple[int, int], kind: str = "bicubic"
) -> Float[Array, "R D"]:
    """Resamples learned position embeddings to another grid, at half-pixel centers or `corners`.

    Equal to PyTorch's `interpolate`, which public checkpoints use.

    Args:
      table: one embedding per patch, row by row.
      old: rows and columns of the table's grid.
      new: rows and columns of the grid of the result; R = rows * columns.
      kind: a value of `Vision.resample_positions`.
    """
    if old == new:
        return table
    rows, columns = (
        _interpolation(np.arange(count), count, cells, kind) for cells, count in zip(old, new)
    )
    grid = table.reshape(*old, -1)  # (h, w, D)
    grid = jnp.einsum("rh,hwd->rwd", rows.astype(np.float32), grid)
    grid = jnp.einsum("cw,rwd->rcd", columns.astype(np.float32), grid)
    return grid.reshape(new[0] * new[1], -1)


def positions_at(
    table: Float[Array, "h w D"],
    places: Int[Array, "B P 2"],
    grids: Int[Array, "B P 2"],
    kind: str,
) -> Float[Array, "B P D"]:
    """`resample_positions` for patches of images of any grids: the embedding of each patch.

    Args:
      places: row and column of each patch.
      grids: rows and columns of its image (`image_grids`).
    """
    rows, columns = (
        _interpolation(places[..., axis], grids[..., axis], table.shape[axis], kind, jnp)
        for axis in (0, 1)
    )
    return jnp.einsum("bph,bpw,hwd->bpd", rows, columns, table)


def image_grids(
    patch_images: Int[Array, "B P"], patch_places: Int[Array, "B P 2"]
) -> Int[Array, "B P 2"]:
    """Rows and columns of the image of each patch; the arguments are of `Batch`."""

    def in_row(images, places):
        segments = len(images) + 1
        return jax.ops.segment_max(places, images, num_segments=segments)[images] + 1

    return jax.vmap(in_row)(patch_images, patch_places)


def _interpolation(cells, count, old: int, kind: str, xp=np):
    """Weights (..., old) with which cells of `count` new ones are made of `old` ones.

    Args:
      xp: numpy, or jax.numpy for traced `cells` and `count`.
    """
    if kind == "corners":
        centers = cells * ((old - 1) / xp.maximum(count - 1, 1))
        return xp.maximum(0, 1 - xp.abs(xp.arange(old) - centers[..., None]))
    scale = xp.broadcast_to(xp.asarray(old / count), cells.shape)
    return INTERPOLATIONS[kind]((cells + 0.5) * scale - 0.5, scale, old, xp)


def _linear_weights(centers, scale, old: int, xp):
    """A triangle, as wide as a new cell if that is wider than an old one."""
    distances = xp.abs(xp.arange(old) - centers[..., None])
    weights = xp.maximum(0, 1 - distances / xp.maximum(1, scale)[..., None])
    return weights / weights.sum(-1, keepdims=True)


def _cubic_weights(centers, scale, old: int, xp, a: float = -0.75):
    """Four taps, clamped at the border: Keys' cubic kernel; `jax.image.resize` uses a = -0.5."""
    cells = xp.floor(centers)[..., None] + xp.arange(-1, 3)
    d = xp.abs(centers[..., None] - cells)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1  # for d <= 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a  # for 1 < d < 2
    values = xp.where(d <= 1, near, xp.where(d < 2, far, 0))
    # At the border several taps fall on the same clamped cell.
    is_cell = xp.clip(cells, 0, old - 1)[..., None] == xp.arange(old)
    return (values[..., None] * is_cell).sum(-2)


INTERPOLATIONS = {"bicubic": _cubic_weights, "bilinear": _linear_weights}


class PatchEmbed(nn.Module):
    """Patch and position embedding (Dosovitskiy et al. 2021, eq. 1): images -> (B, P, D).

    A linear layer over flattened patches, or the equal strided convolution. Both store their
    kernel as (C, D), so the weights of one load into the other. Without an encoder, images that are
    already cut into patches, (B, P, C), pass unchanged (Fuyu). With `patch_frames` f the kernel is
    (f * C, D).

    Args:
      places: row and column of each patch of images (B, P, C) at native resolution.
      grids: rows and columns of its image.
    """

    cfg: Vision

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B *dims"],
        places: Int[Array, "B P 2"] | None = None,
        grids: Int[Array, "B P 2"] | None = None,
    ) -> Float[Array, "B P D"]:
        cfg, patch = self.cfg, self.cfg.patch_size_px
        if images.ndim == 3 and not cfg.has_encoder:
            return images
        tokens = self._tokens(images)
        if cfg.positions == "none":
            return tokens
        if places is not None:
            positions = self._positions_at(places, grids, tokens.shape[-1])
        else:
            grid = images.shape[1] // patch, images.shape[2] // patch
            positions = self._position_embedding(grid, tokens.shape[-1])
        return tokens + positions.astype(tokens.dtype)

    def _tokens(self, images):
        """(B, height, width, channels) or (B, P, C) -> (B, P, D), without positions."""
        cfg, patch = self.cfg, self.cfg.patch_size_px
        if not cfg.has_encoder:
            return patchify(images, patch)
        if cfg.patch_embed == "conv":
            return _Convolution(cfg, name="projection")(images)
        shape = (cfg.patch_frames * cfg.patch_dim, cfg.width)
        projection = Dense("C D", shape, bias=cfg.patch_bias, name="projection")
        patches = images if images.ndim == 3 else patchify(whole_patches(images, patch), patch)
        return projection(jnp.tile(patches, cfg.patch_frames) if cfg.patch_frames > 1 else patches)

    def _position_embedding(self, grid, width):
        """(P, D) for a grid of rows and columns."""
        cfg = self.cfg
        if cfg.positions == "sincos":
            return jnp.asarray(sincos_positions(grid, width))
        return resample_positions(self._table(width), cfg.grid, grid, cfg.resample_positions)

    def _positions_at(self, places, grids, width):
        """(B, P, D), at native resolution."""
        cfg = self.cfg
        if cfg.positions == "sincos":
            return sincos_embedding(places, width)
        table = self._table(width).reshape(*cfg.grid, width)
        return positions_at(table, places, grids, cfg.resample_positions)

    def _table(self, width):
        """Learned positions (P, D) of an image of `image_size_px`."""
        shape = (self.cfg.grid[0] * self.cfg.grid[1], width)
        return self.param("positions", axes.with_axes(embedding_init, "P D"), shape)


class _Convolution(nn.Module):
    """Patch embedding by a strided convolution, with the parameters of the linear layer."""

    cfg: Vision

    @nn.compact
    def __call__(self, images):
        cfg, patch = self.cfg, self.cfg.patch_size_px
        init = axes.with_axes(nn.initializers.lecun_normal(), "C D", contracted=1)
        kernel = self.param("kernel", init, (cfg.patch_dim, cfg.width))
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
