"""Patches: their layout, the equality of linear and convolutional embedding, and positions."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from vlm_jax.config import Vision
from vlm_jax.nn import patches

RNG = np.random.default_rng(0)


def random(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, params, images):
    return patches.PatchEmbed(cfg).apply({"params": params}, images)


def random_params(cfg):
    side = cfg.image_size_px
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(patches.PatchEmbed(cfg).init, jax.random.key(0), images)
    return jax.tree.map(lambda x: random(*x.shape), meta.unbox(shapes["params"]))


def test_nine_patches_of_16x16x3_give_1_9_768():
    assert patches.patchify(random(1, 48, 48, 3), 16).shape == (1, 9, 768)


def test_a_gray_patch_goes_from_256_to_768():
    flat = patches.patchify(random(1, 16, 16, 1), 16)
    assert flat.shape == (1, 1, 256)
    assert (flat @ random(256, 768)).shape == (1, 1, 768)


def test_patches_and_their_pixels_are_in_row_order():
    """An image of 2 x 4 pixels in two patches, each pixel its own number."""
    image = jnp.arange(8.0).reshape(1, 2, 4, 1)
    assert patches.patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def convolve(images, kernel, patch_size_px):
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(patch_size_px,) * 2,
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize("patch_embed", ["linear", "conv"])
def test_pixels_that_fill_no_patch_are_not_read(patch_embed):
    cfg = Vision(width=5, image_size_px=14, patch_size_px=4, patch_embed=patch_embed)
    params, images = random_params(cfg), random(2, 10, 15, 3)
    cropped = images[:, :8, :12]
    np.testing.assert_array_equal(run(cfg, params, images), run(cfg, params, cropped))


@pytest.mark.parametrize("channels", [1, 3])
def test_linear_embedding_is_the_strided_convolution_with_equal_weights(channels):
    images, kernel = random(2, 12, 8, channels), random(4, 4, channels, 5)
    product = patches.patchify(images, 4) @ patches.linear_from_conv(kernel)
    np.testing.assert_allclose(
        product, convolve(images, kernel, 4).reshape(2, 6, 5), rtol=1e-5, atol=1e-4
    )


def test_kernels_of_linear_and_conv_convert_both_ways():
    kernel = random(4, 4, 3, 5)
    linear = patches.linear_from_conv(kernel)
    assert linear.shape == (48, 5)
    np.testing.assert_array_equal(patches.conv_from_linear(linear, 4), kernel)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_conv_embeddings_are_equal_for_equal_parameters(bias):
    linear = Vision(image_size_px=12, patch_size_px=4, width=8, patch_bias=bias)
    conv = replace(linear, patch_embed="conv")
    images = random(2, 12, 12, 3)
    params = random_params(linear)
    same_shapes = jax.tree.map(jnp.shape, params)
    assert same_shapes == jax.tree.map(jnp.shape, random_params(conv))
    assert ("bias" in params["projection"]) == bias
    np.testing.assert_allclose(
        run(linear, params, images), run(conv, params, images), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("grid, width", [((4, 4), 16), ((3, 5), 16), ((8, 8), 18)])
def test_sincos_positions_are_distinct_for_every_patch(grid, width):
    table = patches.sincos_positions(grid, width)
    assert table.shape == (grid[0] * grid[1], width)
    distances = np.abs(table[:, None] - table[None]).max(-1) + np.eye(len(table))
    assert distances.min() > 0.01


def test_sincos_positions_hold_columns_then_rows():
    table = patches.sincos_positions((3, 5), 16).reshape(3, 5, 16)
    assert (table[:1, :, :8] == table[:, :, :8]).all()
    assert (table[:, :1, 8:] == table[:, :, 8:]).all()


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_are_added_to_the_patches(positions):
    cfg = Vision(image_size_px=8, patch_size_px=4, width=8, positions=positions)
    black = jnp.zeros((1, 8, 8, 3))
    params = {"projection": {"kernel": random(48, 8), "bias": jnp.zeros(8)}}
    table = random(4, 8) if positions == "learned" else patches.sincos_positions((2, 2), 8)
    params |= {"positions": table} if positions == "learned" else {}
    np.testing.assert_array_equal(run(cfg, params, black)[0], table)


def test_without_positions_or_encoder_the_tokens_are_the_patches():
    cfg = Vision(image_size_px=8, patch_size_px=4, kind="none", positions="none")
    images = random(1, 8, 8, 3)
    np.testing.assert_array_equal(run(cfg, {}, images), patches.patchify(images, 4))


def test_an_image_of_another_size_gets_resampled_positions():
    cfg = Vision(image_size_px=8, patch_size_px=4, width=8)
    table = random(4, 8)
    params = {"projection": {"kernel": random(48, 8), "bias": jnp.zeros(8)}, "positions": table}
    larger = run(cfg, params, jnp.zeros((1, 12, 16, 3)))
    np.testing.assert_allclose(
        larger[0], patches.resample_positions(table, (2, 2), (3, 4)), atol=1e-6
    )


def test_resampling_to_the_same_grid_is_the_identity():
    table = random(6, 4)
    assert patches.resample_positions(table, (2, 3), (2, 3)) is table


@pytest.mark.parametrize("new", [(2, 2), (5, 3), (7, 9)])
def test_a_constant_table_stays_constant(new):
    resampled = patches.resample_positions(jnp.full((12, 2), 3.0), (3, 4), new)
    np.testing.assert_allclose(resampled, np.full((new[0] * new[1], 2), 3.0), rtol=1e-6)


def keys_cubic(d, a=-0.75):
    d = abs(d)
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else 0.0


def bicubic(grid, new):
    """Cell by cell: 4 x 4 taps at half-pixel centers, clamped at the border."""
    (height, width), out = grid.shape[:2], np.zeros((*new, *grid.shape[2:]))
    for row in range(new[0]):
        for column in range(new[1]):
            y, x = (row + 0.5) * height / new[0] - 0.5, (column + 0.5) * width / new[1] - 0.5
            top, left = int(np.floor(y)), int(np.floor(x))
            for i in range(top - 1, top + 3):
                for j in range(left - 1, left + 3):
                    cell = grid[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
                    out[row, column] += keys_cubic(y - i) * keys_cubic(x - j) * cell
    return out


@pytest.mark.parametrize("new", [(6, 8), (5, 3), (2, 2), (1, 7)])
def test_resampling_is_bicubic_as_in_pytorch(new):
    table = random(12, 2)
    expected = bicubic(np.asarray(table).reshape(3, 4, 2), new).reshape(-1, 2)
    np.testing.assert_allclose(patches.resample_positions(table, (3, 4), new), expected, atol=1e-5)


@pytest.mark.parametrize("new", [(6, 8), (2, 3), (1, 7)])
def test_bilinear_resampling_has_antialiasing(new):
    table = random(12, 2)
    expected = jax.image.resize(table.reshape(3, 4, 2), (*new, 2), "bilinear", antialias=True)
    resampled = patches.resample_positions(table, (3, 4), new, "bilinear")
    np.testing.assert_allclose(resampled, expected.reshape(-1, 2), atol=1e-5)


@pytest.mark.parametrize("kind", patches.INTERPOLATIONS)
def test_positions_of_packed_patches_are_resampled_to_the_grid_of_each_image(kind):
    """A row with an image of 2 x 5 patches, one of 4 x 1 and two slots of padding."""
    table, grids = random(12, 2), [(2, 5), (4, 1)]
    images = np.array([1] * 10 + [2] * 4 + [0] * 2)
    places = np.zeros((16, 2), int)
    places[:10] = np.indices((2, 5)).reshape(2, -1).T
    places[10:14, 0] = np.arange(4)
    found_grids = patches.image_grids(jnp.asarray(images[None]), jnp.asarray(places[None]))
    np.testing.assert_array_equal(found_grids[0], np.array([(1, 1), *grids])[images])
    found = patches.positions_at(
        table.reshape(3, 4, 2), jnp.asarray(places[None]), found_grids, kind
    )
    expected = [patches.resample_positions(table, (3, 4), grid, kind) for grid in grids]
    np.testing.assert_allclose(found[0, :14], np.concatenate(expected), atol=1e-5)
