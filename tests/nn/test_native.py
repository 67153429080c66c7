"""Images at native resolution, for every fusion style."""

import functools
import operator
from dataclasses import replace

import jax
import numpy as np
import pytest

from vlm_jax import axes
from vlm_jax.config import ConfigError, Mesh, PatchRope, Projector, Rope
from vlm_jax.data import native, pipeline, questions
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.generate import SamplingParams, generate
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.projector import build_projector
from vlm_jax.nn.vlm import VLM
from vlm_jax.sharding import parameter_shardings, place_rows
from vlm_jax.structs import NO_IMAGE, PADDING, Batch
from vlm_jax.testing import KINDS, tiny, write_conversations

every_kind = pytest.mark.parametrize("kind", KINDS)
MOST = 24  # patches of an image; 2 x 2 of them become a token


def experiment(kind):
    """Two blocks each, windows, DeepStack, and M-RoPE where images are in the sequence."""
    cfg = tiny(kind, projector=Projector("pixel_shuffle", factor=2))
    vision = replace(
        cfg.vision,
        depth=2,
        max_patches=MOST,
        patch_square=2,
        positions="sincos",
        rope=PatchRope("same"),
        window_patches=4,
        windowed_layers=(0,),
        deepstack_layers=() if kind == "encoder_decoder" else (1,),
    )
    decoder = replace(cfg.decoder, rope=Rope(sections=(2, 1, 1)))
    return replace(cfg, vision=vision, decoder=decoder)


# Each of the images of a row has three queries.
WITH_QUERIES = [
    Projector("resampler", heads=4, queries=3, depth=1),
    Projector("resampler", heads=4, queries=3, depth=1, block_norms=True),
    Projector("qformer", heads=4, queries=3, depth=1),
]


def with_queries(kind, projector):
    cfg = replace(experiment(kind), projector=projector)
    vision = replace(cfg.vision, patch_square=1, deepstack_layers=(), depth=1)
    return replace(cfg, vision=vision, decoder=replace(cfg.decoder, depth=1))


def picture(rows, columns, seed=0):
    """A random image, (16 * rows, 16 * columns, 3)."""
    rng = np.random.default_rng((rows, columns, seed))
    return rng.uniform(-1, 1, (16 * rows, 16 * columns, 3)).astype(np.float32)


class Letters:
    """A tokenizer: a character is a token."""

    def encode(self, text):
        return [20 + ord(letter) % 200 for letter in text]


PROMPTS = ["which of the two?", "what?", "small?", "nothing?"]
IMAGES = [[picture(2, 3), picture(1, 2)], [picture(3, 2)], [picture(1, 1)], []]


def prompts(cfg, images=IMAGES, texts=PROMPTS) -> Batch:
    return questions.prompt_batch(cfg, Letters(), images, texts, 32)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-4)


@every_kind
def test_a_batch_of_images_of_any_size_is_one_by_one(kind, forward, random_params):
    cfg = experiment(kind)
    params, batch = random_params(cfg), prompts(cfg)
    logits = forward(cfg, params, batch).logits
    for row, images in enumerate(IMAGES):
        # The most images first, so that it is the program of the mixed batch.
        alone = prompts(cfg, [IMAGES[0], images, images, images], [PROMPTS[row]] * 4)
        is_token = alone.segment_ids[1] != PADDING
        close(logits[row][is_token], forward(cfg, params, alone).logits[1][is_token])


@every_kind
def test_eight_devices_give_the_logits_of_one(kind, forward, random_params):
    """Rows on four devices, each parameter in two parts."""
    cfg = experiment(kind)
    params, batch = random_params(cfg), prompts(cfg)
    mesh = axes.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(abstract_params(cfg), mesh))
        actual = forward(cfg, placed, place_rows(batch, mesh)).logits
    close(actual, forward(cfg, params, batch).logits)


@every_kind
def test_a_token_reads_its_own_images_alone_and_no_padding(kind, forward, random_params):
    cfg = experiment(kind)
    params, batch = random_params(cfg), prompts(cfg)
    logits = forward(cfg, params, batch).logits
    is_token = np.asarray(batch.segment_ids) != PADDING

    def moved(images):
        other = forward(cfg, params, batch.replace(images=images)).logits
        return [bool(np.abs(a - b)[own].max() > 1e-4) for a, b, own in zip(logits, other, is_token)]

    noise = np.random.default_rng(9).uniform(-1, 1, batch.images.shape).astype(np.float32)
    is_padding = (batch.patch_images == PADDING)[..., None]
    assert moved(np.where(is_padding, noise, batch.images)) == [False] * 4
    of_first = (batch.patch_images == 1)[..., None]
    assert moved(np.where(of_first, noise, batch.images)) == [True, True, True, False]


@pytest.mark.parametrize(
    "projector",
    [Projector("average_pool", factor=2), Projector("pixel_shuffle", factor=2), *WITH_QUERIES[::2]],
    ids=lambda projector: projector.kind,
)
def test_a_projector_has_the_tokens_of_an_image_of_one_size(projector, random_params):
    """An image of `vision.image_size_px` px is an image like any other at native resolution."""
    vision = replace(tiny().vision, image_size_px=32)
    square = projector.merged_side
    native_vision = replace(vision, max_patches=16, patch_square=square)
    cfg, of_native = [tiny(projector=projector, vision=x) for x in (vision, native_vision)]
    params = random_params(cfg)["projector"]
    x = np.random.default_rng(0).normal(size=(2, 16, 32)).astype(np.float32)
    rows, columns = native.patch_places((4, 4), square).T

    def project(cfg, *inputs):
        return jax.jit(build_projector(cfg.model).apply)({"params": params}, *inputs)

    inputs = (x[:, 4 * rows + columns],)
    if projector.spec.tokens == "queries":
        inputs += (np.ones((2, 16), np.int32),)
    close(project(of_native, *inputs), project(cfg, x))


@pytest.mark.parametrize("projector", WITH_QUERIES[1:], ids=lambda projector: projector.kind)
def test_the_queries_of_an_image_read_its_patches_alone(projector, random_params):
    """An image is the same 3 tokens, whatever is packed with it; padding is not read."""
    cfg = with_queries("unified", projector)
    params, batch = random_params(cfg), prompts(cfg)

    @jax.jit
    def encode(batch):
        return VLM(cfg.model).apply({"params": params}, batch, method="image_tokens")

    tokens = np.asarray(encode(batch)).reshape(4, 2, 3, -1)  # (B, I, Q, D)
    noise = np.random.default_rng(9).uniform(-1, 1, batch.images.shape).astype(np.float32)
    is_other = (batch.patch_images != 2)[..., None]
    other = np.asarray(encode(batch.replace(images=np.where(is_other, noise, batch.images))))
    other = other.reshape(tokens.shape)
    close(other[0, 1], tokens[0, 1])
    assert np.abs(other - tokens)[:3, 0].max((1, 2)).min() > 1e-3
    moved = prompts(cfg, [[picture(1, 2)], IMAGES[0], [picture(3, 2)], []])
    tokens_of_moved = np.asarray(encode(moved)).reshape(tokens.shape)
    close(tokens_of_moved[0, 0], tokens[0, 1])
    close(tokens_of_moved[1], tokens[0])


def test_a_batch_with_queries_is_one_by_one(forward, random_params):
    in_sequence = prompts(with_queries("unified", WITH_QUERIES[0]))
    counts = (np.asarray(in_sequence.image_token_index) != NO_IMAGE).sum(1)
    assert counts.tolist() == [2 * 3, 3, 3, 0]
    cfg = with_queries("cross_attention", WITH_QUERIES[0])
    params, batch = random_params(cfg), prompts(cfg)
    logits = forward(cfg, params, batch).logits
    for row in (1, 2):
        images = [IMAGES[0], IMAGES[row], [], []]
        alone = prompts(cfg, images, ["?", PROMPTS[row], "?", "?"])
        is_token = alone.segment_ids[1] != PADDING
        close(logits[row][is_token], forward(cfg, params, alone).logits[1][is_token])


def test_an_image_has_the_same_tokens_whatever_is_packed_with_it(random_params):
    cfg = experiment("unified")
    params, batch = random_params(cfg), prompts(cfg)

    @jax.jit
    def encode(batch):
        return VLM(cfg.model).apply({"params": params}, batch, method="image_tokens")

    tokens, images = np.asarray(encode(batch)), batch.patch_images[:, ::4]
    noise = np.random.default_rng(9).uniform(-1, 1, batch.images.shape).astype(np.float32)
    of_first = (batch.patch_images == 1)[..., None]
    other = encode(batch.replace(images=np.where(of_first, noise, batch.images)))
    close(other[images == 2], tokens[images == 2])
    assert np.abs(tokens - other)[images == 1].max() > 1e-3
    moved = prompts(cfg, [[picture(1, 2)], IMAGES[0], [], []])
    close(encode(moved)[0, :2], tokens[0][images[0] == 2])


def test_a_decoded_token_reads_the_images_of_its_row(forward, random_params):
    """The tokens of images are in the memory, of unequal number in each row."""
    cfg = experiment("cross_attention")
    params, batch = random_params(cfg), prompts(cfg)
    new = np.asarray(generate(cfg.model, params, batch, 2, SamplingParams()))
    logits = forward(cfg, params, batch).logits[:, -1]
    np.testing.assert_array_equal(new[:, 0], logits.argmax(-1))
    # A prompt ends with a line end; the first new token replaces another one after it.
    longer = prompts(cfg, texts=[text + "\n" for text in PROMPTS])
    tokens = np.concatenate([longer.tokens[:, :-1], new[:, :1]], axis=1)
    logits = forward(cfg, params, longer.replace(tokens=tokens)).logits[:, -1]
    np.testing.assert_array_equal(new[:, 1], logits.argmax(-1))


def test_a_cross_attention_reads_its_own_level(forward, random_params):
    """The first reads the level of DeepStack alone, the second the encoder's output alone."""
    cfg = experiment("cross_attention")
    params, batch = random_params(cfg), prompts(cfg)

    def is_read(silent, projection):
        """Returns whether a projection has an effect without the cross-attention `silent`."""
        logits = []
        for factor in (1, 2):
            model = jax.tree.map(np.array, params)
            out = model["decoder"]["blocks"]["layers"]["block_0"]["cross"]["out"]
            out["kernel"][silent] = 0
            kernel = functools.reduce(operator.getitem, projection, model["projector"])
            kernel["kernel"] *= factor
            logits.append(forward(cfg, model, batch).logits)
        return bool(np.abs(np.subtract(*logits)).max() > 1e-3)

    level, output = ("deepstack_0", "linear"), ("linear",)
    assert [is_read(0, level), is_read(0, output)] == [False, True]
    assert [is_read(1, level), is_read(1, output)] == [True, False]


def test_positions_of_m_rope_count_from_the_start_of_an_image():
    images = np.array([0, 1, 1, 1, 1, 1, 1, 0, 2, 0])
    time, row, column = native.rope_positions(images, [(2, 3), (1, 1)]).T
    np.testing.assert_array_equal(time, [0, 1, 1, 1, 1, 1, 1, 4, 5, 6])
    np.testing.assert_array_equal(row, [0, 1, 1, 1, 2, 2, 2, 4, 5, 6])
    np.testing.assert_array_equal(column, [0, 1, 2, 3, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((16, 16), (16, 16)),
        ((40, 25), (32, 32)),
        ((1, 1), (16, 16)),
        ((1, 5000), (16, 96)),
        ((5000, 1), (96, 16)),
        ((1000, 1000), (32, 32)),
        ((300, 200), (48, 32)),
    ],
)
def test_an_image_keeps_its_shape_within_the_budget_of_patches(size, shape):
    assert native.resized_shape(*size, experiment("unified").vision) == shape


def test_patches_of_a_square_follow_one_another():
    image = np.arange(16).reshape(4, 4, 1)
    places = native.patch_places((4, 4), 2)
    np.testing.assert_array_equal(places[:5], [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]])
    patches = native.to_patches(image, 1, 2)
    np.testing.assert_array_equal(patches[:, 0], image[tuple(places.T)][:, 0])


# Room for as many images, and for as many patches as five small images have.
@pytest.mark.parametrize("patches", [None, 40])
def test_conversations_that_share_a_row_have_their_own_patches_and_positions(tmp_path, patches):
    cfg = experiment("hybrid")
    data = write_conversations(tmp_path, count=4)
    sizes = {"images_per_row": 5, "patches_per_row": patches, "text_length": 200}
    cfg = replace(cfg, data=replace(data, **sizes))
    cfg = replace(cfg, vision=replace(cfg.vision, max_patches=12))
    cfg = replace(cfg, train=replace(cfg.train, batch_size=1))
    tokenizer = Tokenizer.train(PROMPTS, cfg.decoder.vocab_size)
    batch = next(pipeline.training_iterator(cfg, tokenizer))
    small = replace(cfg, data=replace(cfg.data, patches_per_row=20))
    with pytest.raises(ConfigError, match="patches_per_row 20 is too small: .* 2 .* at least 24"):
        pipeline.training_iterator(small, tokenizer)
    ids = np.asarray(batch.segment_ids[0])
    assert ids.max() > 1
    images = batch.patch_images[0, ::4]
    assert batch.images.shape[1] == cfg.patches_per_row == (patches or 60)
    assert batch.tokens.shape[1] == cfg.row_length == cfg.squares_per_row + 200
    for segment in range(1, ids.max() + 1):
        own = ids == segment
        index = batch.image_token_index[0][own]
        owners = images[index[index != NO_IMAGE]]
        read = np.flatnonzero(batch.image_mask[0][own].any(axis=0)) + 1
        np.testing.assert_array_equal(np.unique(owners), read)
        # All tokens of its images, in order.
        np.testing.assert_array_equal(
            index[index != NO_IMAGE], np.flatnonzero(np.isin(images, read))
        )
        # 24 x 18 px are 1 x 2 tokens. The images of a conversation count from 1.
        numbers = np.zeros(len(index), int)
        numbers[index != NO_IMAGE] = np.searchsorted(read, owners) + 1
        expected = native.rope_positions(numbers, [(1, 2)] * len(read))
        np.testing.assert_array_equal(batch.rope_positions[0][own], expected)


def test_the_tokens_of_an_image_are_as_many_as_its_squares():
    batch = prompts(experiment("unified"))
    counts = [(np.asarray(index) != NO_IMAGE).sum() for index in batch.image_token_index]
    assert counts == [6 + 2, 6, 1, 0]


def test_a_batch_of_small_images_is_short():
    """Evaluation compiles one program for each halving, a prompt has the patches that it needs."""
    cfg = experiment("unified")

    def shape(*images, text="?", **options):
        batch = questions.prompt_batch(cfg, Letters(), [[*images]], [text], **options)
        return batch.tokens.shape[1], batch.images.shape[1]

    small, large = picture(1, 1), picture(2, 3)
    cfg = replace(cfg, data=replace(cfg.data, images_per_row=1))
    assert shape(small) == (1 + 2, 16 * 4)
    most = {"length": 50, "is_longest": True}
    assert shape(large, **most) == (13, MOST)
    assert shape(small, **most) == (4, 4)
    assert shape(large, text="which of the two?" * 2, **most) == (50, MOST)
    assert shape(small, text="which of the two?", **most) == (25, 4)
    assert shape(small, small, large, small, **most) == (13, 4 * MOST // 2)
