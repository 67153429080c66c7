"""Attention maps: weights become maps of patches, and cost nothing unless they are asked for."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import look
from vlm_jax.config import Projector, UserError
from vlm_jax.data import questions, tiling
from vlm_jax.hub.images.steps import PixelScale
from vlm_jax.infer.look.answer import END, split_words
from vlm_jax.infer.look.maps import _RowPatches, append_answer
from vlm_jax.infer.look.observe import gradient_relevance, observe
from vlm_jax.infer.look.pictures import join_views, place_views
from vlm_jax.nn import attention
from vlm_jax.nn.attention import PERTURBATIONS, WEIGHT, WEIGHTS
from vlm_jax.nn.vlm import VLM
from vlm_jax.testing import hybrid_in_tiles, random_batch, random_params, tiny


def without_targets(batch):
    return batch.replace(targets=None, loss_weights=None)


@functools.cache
def example(kind, **settings):
    """A model of two blocks, its parameters and two rows; hybrid has images of two tiles."""
    cfg = hybrid_in_tiles() if kind == "hybrid" else tiny(kind)
    cfg = replace(cfg, decoder=replace(cfg.decoder, **settings))
    return cfg.model, random_params(cfg, 0.3), random_batch(cfg, 2)


def test_the_forward_pass_is_the_same_program_unless_maps_are_asked_for(monkeypatch):
    cfg, params, batch = example("cross_attention")

    def program(**settings):
        def forward(params, batch):
            return VLM(cfg).apply({"params": params}, batch, **settings)

        return str(jax.make_jaxpr(forward)(params, without_targets(batch)))

    before, observed = program(), program(mutable=[WEIGHTS])
    assert before != observed
    monkeypatch.delattr(attention.Attention, "_observe")
    monkeypatch.setattr(attention.Attention, "is_mutable_collection", lambda self, name: False)
    assert program() == before


def test_fused_kernels_do_not_run_when_maps_are_asked_for(monkeypatch):
    cfg, params, batch = example("unified")

    def kernel_for(*_):
        raise AssertionError("a kernel was chosen")

    monkeypatch.setattr(attention, "kernel_for", kernel_for)
    slots = np.zeros((2, 1), int)
    shapes = jax.eval_shape(
        functools.partial(observe.__wrapped__, cfg), params, without_targets(batch), slots
    )
    length = batch.tokens.shape[1]
    assert shapes.self.shape == (2, 2, cfg.decoder.heads, 1, length)


def test_maps_of_every_layer_sum_to_the_attention_on_the_image():
    cfg, params, batch = example("hybrid")
    maps = look(VLM(cfg), params, batch, rollout=True)
    assert [len(row.tokens) for row in maps] == (batch.loss_weights > 0).sum(1).tolist()
    length = batch.tokens.shape[1]
    slots = np.broadcast_to(np.arange(length), (2, length))
    everything = observe(cfg, params, without_targets(batch), slots, True)
    for row, row_maps in enumerate(maps):
        assert row_maps.layers == ("cross 0", "self 0", "cross 1", "self 1")
        asked = np.flatnonzero(batch.loss_weights[row])
        assert (row_maps.tokens == batch.targets[row, asked]).all()
        on_image = row_maps.weights.sum((-3, -2, -1))  # (A, L, N)
        np.testing.assert_allclose(on_image[:, ::2], 1, atol=1e-5)
        is_image = batch.image_token_index[row] >= 0
        sums = np.asarray(everything.self)[:, row][..., asked, :][..., is_image].sum(-1)
        np.testing.assert_allclose(np.moveaxis(on_image[:, 1::2], 0, 2), sums, atol=1e-5)
    # Row 1 has two tiles in cross-attention and its thumbnail in the sequence.
    tiles, thumbnail = maps[1].weights[:, ::2], maps[1].weights[:, 1::2]
    assert (tiles[..., 2, :, :] == 0).all() and (tiles[..., :2, :, :] > 0).all()
    assert (thumbnail[..., :2, :, :] == 0).all() and (thumbnail[..., 2, :, :] > 0).all()
    np.testing.assert_allclose(
        np.asarray(everything.rollout)[1], rolled_out(batch, everything)[1], atol=1e-5
    )


def rolled_out(batch, observed):
    """Rollout over one square matrix of sequence and image tokens (Abnar and Zuidema 2020)."""
    crosses, selfs = np.asarray(observed.cross).mean(2), np.asarray(observed.self).mean(2)
    length, total = selfs.shape[-1], selfs.shape[-1] + crosses.shape[-1]
    shares = np.broadcast_to(np.eye(total), (2, total, total))
    for cross, self in zip(crosses, selfs):
        for weights, columns in ((cross, slice(length, total)), (self, slice(0, length))):
            matrix = np.zeros((2, total, total))
            matrix[:, :length, columns] = weights
            matrix[:, range(length, total), range(length, total)] = 1
            shares = (matrix / 2 + np.eye(total) / 2) @ shares
    return shares[:, :length]


def test_gradient_relevance_is_that_of_finite_differences():
    cfg, params, batch = example("encoder_decoder", depth=1)
    batch = without_targets(batch)
    slots, targets = np.array([20, 21]), np.array([7, 9])
    relevance = gradient_relevance(cfg, params, batch, slots, targets)
    weights = np.asarray(observe(cfg, params, batch, slots[:, None]).cross)[0, :, :, 0]  # (B, N, T)
    step = 1e-2

    @jax.jit
    def gradient(params, batch, head, key):
        def with_step(step):
            shape = (1, 2, cfg.decoder.heads, batch.tokens.shape[1], weights.shape[-1])
            rows = jnp.arange(2)
            added = jnp.zeros(shape).at[0, rows, head, slots, key].set(step)
            block = {"block_0": {"cross": {WEIGHT: added}}}
            variables = {
                "params": params,
                PERTURBATIONS: {"decoder": {"blocks": {"layers": block}}},
            }
            output, _ = VLM(cfg).apply(variables, batch, mutable=[WEIGHTS])
            return output.logits[rows, slots, targets]

        return (with_step(step) - with_step(-step)) / (2 * step)

    heads, keys = np.indices(weights.shape[1:]).reshape(2, -1)
    gradients = np.stack([gradient(params, batch, *at) for at in zip(heads, keys)], axis=1)
    gradients = gradients.reshape(weights.shape)
    expected = np.maximum(gradients * weights, 0).mean(1)
    actual = np.asarray(relevance)[:, batch.tokens.shape[1] :]
    np.testing.assert_allclose(actual, expected, rtol=0.02, atol=1e-4)


def test_a_resampler_divides_the_weight_of_a_query_among_patches():
    cfg = tiny("cross_attention", projector=Projector("resampler", heads=4, queries=3, depth=2))
    batch = random_batch(cfg, 2)
    (maps, _) = look(VLM(cfg.model), random_params(cfg, 0.3), batch)
    np.testing.assert_allclose(maps.weights.sum((-3, -2, -1)), 1, atol=1e-5)
    assert maps.weights.shape[-2:] == cfg.vision.grid


@pytest.mark.parametrize("kind, block_norms", [("resampler", True), ("qformer", False)])
def test_other_projectors_with_queries_are_observed_too(kind, block_norms):
    projector = Projector(kind, heads=4, queries=3, depth=2, block_norms=block_norms)
    cfg = tiny("cross_attention", projector=projector)
    batch = random_batch(cfg, 2)
    slots = np.zeros((2, 1), np.int32)
    observed = jax.eval_shape(observe, cfg.model, random_params(cfg), batch, slots)
    assert observed.resampler.shape == (2, 3, math.prod(cfg.vision.grid))


IMAGES = [[(2, 3), (1, 2)], [(3, 1)]]  # rows and columns of squares of 16 px, by row
NATIVE = {
    "hybrid": Projector("pixel_shuffle", factor=2),
    "cross_attention": Projector("resampler", heads=4, queries=3, depth=1),
}


class Letters:
    """A tokenizer: a character is a token."""

    def encode(self, text):
        return [20 + ord(letter) % 200 for letter in text]


def at_native_resolution(kind):
    """A model of one block, two rows with images of three shapes, and the images."""
    cfg = tiny(kind, projector=NATIVE[kind])
    square = NATIVE[kind].merged_side
    vision = replace(cfg.vision, depth=1, max_patches=24, patch_square=square, positions="sincos")
    cfg = replace(cfg, vision=vision, decoder=replace(cfg.decoder, depth=1))
    rng = np.random.default_rng(0)
    images = []
    for row in IMAGES:
        sizes = [(16 * rows, 16 * columns, 3) for rows, columns in row]
        images.append([rng.uniform(-1, 1, size).astype(np.float32) for size in sizes])
    batch = questions.prompt_batch(cfg, Letters(), images, ["two?", "one?"])
    is_last = np.arange(batch.tokens.shape[1]) == batch.tokens.shape[1] - 1
    weights = np.broadcast_to(is_last, batch.tokens.shape).astype(np.float32)
    return cfg, batch.replace(targets=batch.tokens, loss_weights=weights), images


@pytest.mark.parametrize("kind", NATIVE)
def test_maps_of_images_of_any_shape_sum_to_the_attention(kind):
    cfg, batch, _ = at_native_resolution(kind)
    rows = look(VLM(cfg.model), random_params(cfg, 0.3), batch, rollout=True)
    for maps, shapes in zip(rows, IMAGES):
        on_images = maps.weights[:, maps.layers.index("cross 0")].sum((-3, -2, -1))
        np.testing.assert_allclose(on_images, 1, atol=1e-5)
        largest = 2 * np.max(shapes, axis=0)
        assert maps.weights.shape[-3:] == maps.rollout.shape[-3:] == (2, *largest)
        is_patch = np.zeros((2, *largest), bool)
        for image, (height, width) in enumerate(shapes):
            is_patch[image, : 2 * height, : 2 * width] = True
        assert ((maps.weights > 0).any((0, 1, 2)) == is_patch).all()
        assert ((maps.rollout[0] > 0) == is_patch).all()


def test_a_map_of_an_image_of_any_shape_is_on_its_pixels():
    cfg, batch, images = at_native_resolution("hybrid")
    scale = PixelScale(cfg.vision.image_mean, cfg.vision.image_std)
    patches = _RowPatches(cfg.model, batch, 0, None)
    # Tokens that weigh the mean of their pixels.
    weights = batch.images[0].reshape(-1, 4 * cfg.vision.patch_dim).mean(-1)
    maps = patches._to_patches(weights)
    pictures = join_views(cfg.vision, scale, batch, 0, [(1, 1), (1, 1)])
    for picture, image in zip(pictures, images[0], strict=True):
        np.testing.assert_array_equal(picture.pixels, scale.to_rgb(image))
        means = image.reshape(len(image) // 16, 16, -1, 16, 3).mean((1, 3, 4)) / 4
        expected = means.repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_allclose(picture.join(maps), expected, atol=1e-6)


def test_a_token_of_several_patches_is_divided_among_them():
    vision = replace(tiny().vision, image_size_px=32)
    cfg = tiny(projector=Projector("pixel_shuffle", factor=2), vision=vision)
    patches = _RowPatches(cfg.model, random_batch(cfg, 1), 0, None)
    weights = patches._to_patches(np.arange(4.0).reshape(1, 4))
    expected = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]) / 4
    np.testing.assert_array_equal(weights[0], expected)


def test_tiles_and_a_thumbnail_are_joined_to_one_map():
    vision = replace(tiny().vision, tiles=2)
    pixels = np.zeros((16, 32, 3), np.float32)
    pixels[:, 16:] = 1
    views = tiling.stack_views([pixels], vision)[:, ::8, ::8, 0]  # (I, 2, 2), a map of the right
    picture = place_views(vision, pixels.astype(np.uint8), (1, 2))
    only_tiles = np.where(np.arange(3)[:, None, None] < 2, views, 0)
    np.testing.assert_array_equal(picture.join(only_tiles), [[0, 0, 1, 1]] * 2)
    only_thumbnail = views - only_tiles
    np.testing.assert_array_equal(picture.join(only_thumbnail), [[0, 0, 0.5, 0.5]] * 2)
    assert picture.join(views).sum() == views.sum()


def test_tiles_that_a_processor_cuts_follow_one_another():
    """An image of one tile, and one of two with its whole."""
    vision = tiny().vision
    views = np.arange(4.0)[None, :, None, None, None] * np.ones((1, 4, 16, 16, 3)) / 4
    batch = random_batch(tiny(), 1).replace(images=views)
    scale = PixelScale((0, 0, 0), (1, 1, 1))
    one, two = join_views(vision, scale, batch, 0, [(1, 1), (2, 1)])
    assert (one.first_view, one.thumbnail) == (0, None)
    assert (two.first_view, two.thumbnail) == (1, 3)
    assert [set(np.unique(part)) for part in np.split(two.pixels, 2)] == [{64}, {128}]
    maps = np.arange(1.0, 5.0)[:, None, None] * np.ones((4, 2, 2))
    assert one.join(maps).sum() + two.join(maps).sum() == maps.sum()
    with pytest.raises(UserError, match="2 layouts do not fit a batch of 4 views"):
        join_views(vision, scale, batch, 0, [(1, 1), (1, 1)])


def test_an_appended_answer_is_read_as_it_was_written():
    """One forward pass over prompt and answer has the fields of decoding step by step."""
    _, _, batch = example("unified")
    prompt = jax.tree.map(lambda x: x[:1], batch).replace(targets=None, loss_weights=None)
    read = append_answer(prompt, [5, 6, 7])
    length = prompt.tokens.shape[1]
    assert read.tokens.shape == read.positions.shape == read.loss_weights.shape == (1, length + 2)
    assert read.tokens[0, length:].tolist() == [5, 6]
    assert read.targets[read.loss_weights > 0].tolist() == [5, 6, 7]
    last = prompt.positions[0, -1]
    assert read.positions[0, length:].tolist() == [last + 1, last + 2]
    assert read.image_mask.shape[:2] == read.image_token_index.shape == (1, length + 2)


def test_a_word_has_the_tokens_of_its_characters():
    class Processor:
        """Tokens are bytes; 0 ends an answer."""

        eos_ids = (0,)

        def decode(self, ids):
            return bytes(ids).split(b"\0")[0].decode(errors="replace").strip()

    ids = [*"a né".encode(), 0, 0]
    assert split_words(Processor(), ids) == [("a", slice(0, 1)), (" né", slice(1, 5))]
    assert split_words(Processor(), [0, 0]) == [(END, slice(0, 1))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_weights": None}, "has no answers"),
        ({"images": None}, "has no image"),
        ({"loss_weights": np.zeros((2, 28))}, "scores no token"),
    ],
)
def test_a_batch_without_an_answer_or_an_image_is_refused(change, message):
    cfg, params, batch = example("unified")
    with pytest.raises(UserError, match=message):
        look(VLM(cfg), params, batch.replace(**change))


def test_a_model_without_images_is_refused():
    cfg = tiny("text_only")
    with pytest.raises(UserError, match="fusion.kind text_only reads no image"):
        look(VLM(cfg.model), {}, example("unified")[2])
