"""Packed conversations do not affect each other, for every fusion kind.

The next batch is a function of the seed and the step.
"""

import functools
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from vlm_jax.config import Projector, Train, UserError
from vlm_jax.config.validate import validate
from vlm_jax.data import (
    conversations,
    packing,
    pipeline,
    tiling,
)
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import NO_IMAGE, PACKED
from vlm_jax.testing import (
    KINDS,
    hybrid_in_tiles,
    random_params,
    tiny,
    variants,
    write_conversations,
)
from vlm_jax.train.loss import cross_entropy

BIDIRECTIONAL, TILES = "unified, bidirectional prefix", "hybrid in tiles"
NATIVE = "hybrid at native resolution"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(
        tmp_path_factory.mktemp("talks"), count=48
    )  # Grain shuffles a few records slowly


@pytest.fixture(scope="module")
def source(data):
    return conversations.load(data, "train")


@pytest.fixture(scope="module")
def experiments(data):
    found = variants() | {BIDIRECTIONAL: tiny()}
    found[BIDIRECTIONAL] = replace(tiny(), fusion=replace(tiny().fusion, prefix="bidirectional"))
    found[TILES] = replace(
        hybrid_in_tiles(), vision=replace(hybrid_in_tiles().vision, tiles=6)
    )  # all images have six
    native = tiny("hybrid", projector=Projector("pixel_shuffle", factor=2))
    sizes = {"max_patches": 12, "patch_square": 2, "deepstack_layers": (1,)}
    found[NATIVE] = replace(native, vision=replace(native.vision, **sizes))
    longer = {name: replace(cfg.decoder, max_positions=128) for name, cfg in found.items()}
    return {name: replace(cfg, data=data, decoder=longer[name]) for name, cfg in found.items()}


@pytest.fixture(scope="module")
def tokenizer(experiments):
    return pipeline.train_tokenizer(experiments["unified"])


every_kind = pytest.mark.parametrize("name", [*variants(), BIDIRECTIONAL])


def row(cfg, elements):
    """A row with the conversations, as the packer's contract has it."""
    lengths, padding = packing.row_capacity(cfg)
    built = {name: np.full(lengths[name], padding[name]) for name in lengths}
    built |= {
        f"{name}_{kind}": np.zeros(lengths[name], np.int32)
        for name in ("tokens", "images")
        for kind in IDS
    }
    ends = Counter()
    for segment, element in enumerate(elements, 1):
        for name in lengths:
            values = element[name]
            place = slice(ends[name], ends[name] + len(values))
            built[name][place] = values
            if name in ("tokens", "images"):
                built[f"{name}_segment_ids"][place] = segment
                built[f"{name}_positions"][place] = np.arange(len(values))
            ends[name] += len(values)
    return built


IDS = ("segment_ids", "positions")


def to_batch(cfg, source, rows):
    """Pads to twelve rows: with one shape, a model is compiled once for all tests."""
    rows = [*rows, *[[]] * (12 - len(rows))]
    read = packing.pixel_reader(cfg, source)
    return packing.to_batch(
        cfg, [row(cfg, elements) for elements in rows], functools.partial(map, read)
    )


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, batch):
    """Logits, and the loss: one program for all laws of a model."""
    logits = VLM(model).apply({"params": params}, batch).logits
    return logits, cross_entropy(logits, batch)


def logits_of(cfg, batch):
    return np.asarray(outputs(cfg.model, random_params(cfg), batch)[0])


def loss_of(cfg, batch):
    return np.array(outputs(cfg.model, random_params(cfg), batch)[1])


def elements_of(cfg, tokenizer, source):
    return [
        packing.encode_for_packing(cfg, tokenizer, packing.tile_counter(cfg, source), talk)
        for talk in source
    ]


def random_rows(cfg, elements, rng):
    """The elements in a random order, each put into the first row that has room for it."""
    rows = []
    for i in rng.permutation(len(elements)):
        new = elements[i]
        fitting = [
            row
            for row in rows
            if sum(len(e["tokens"]) for e in row) + len(new["tokens"]) <= cfg.row_length
            and sum(len(e["images"]) for e in row) + len(new["images"]) <= cfg.data.images_per_row
        ]
        fitting[0].append(new) if fitting else rows.append([new])
    return rows


@pytest.mark.parametrize("name", [*variants(), BIDIRECTIONAL, TILES, NATIVE])
def test_packed_loss_is_unpacked_loss_in_any_order(name, experiments, tokenizer, source):
    cfg = experiments[name]
    elements = elements_of(cfg, tokenizer, source)[:12]
    assert {len(e["images"]) for e in elements} == {0, 1, 2}
    alone = loss_of(cfg, to_batch(cfg, source, [[e] for e in elements]))
    for seed in range(3):
        rows = random_rows(cfg, elements, np.random.default_rng(seed))
        assert len(rows) < len(elements) / 1.5
        assert any({0, 1, 2} <= {len(e["images"]) for e in row} for row in rows)
        total, count = loss_of(cfg, to_batch(cfg, source, rows))
        assert count == alone[1]
        np.testing.assert_allclose(total, alone[0], rtol=1e-5)


@every_kind
def test_what_another_conversation_says_and_shows_changes_nothing(
    name, experiments, tokenizer, source
):
    cfg = experiments[name]
    elements = elements_of(cfg, tokenizer, source)
    batch = to_batch(cfg, source, [elements[:3]])  # 0, 1 and 2 images
    assert batch.segment_ids.max() == 3
    before = logits_of(cfg, batch)
    rng = np.random.default_rng(0)
    for changed, images in ((1, []), (2, [0]), (3, [1, 2])):
        own = batch.segment_ids == changed
        said = rng.integers(4, cfg.decoder.vocab_size, batch.tokens.shape)
        shown = np.array(batch.images)
        shown[:, images] = rng.normal(size=shown[:, images].shape)
        other = batch.replace(
            tokens=np.where(own, said, batch.tokens).astype(np.int32), images=shown
        )
        after = logits_of(cfg, other)
        others = (batch.segment_ids != changed) & (batch.segment_ids > 0)
        np.testing.assert_array_equal(after[others], before[others])
        assert not np.array_equal(after[own], before[own])
        shown = batch.replace(images=shown)
        assert np.array_equal(logits_of(cfg, shown)[own], before[own]) == (not images)


@every_kind
def test_a_slot_without_an_image_is_read_by_nobody(name, experiments, tokenizer, source):
    cfg = experiments[name]
    batch = to_batch(cfg, source, [elements_of(cfg, tokenizer, source)[:2]])  # 0 and 1 images of 3
    assert not batch.images[:, 1:].any()
    assert batch.image_mask.any(1).sum() == 1
    filled = np.where(batch.image_mask.any(1)[..., None, None, None], batch.images, np.float32(9))
    before, after = logits_of(cfg, batch), logits_of(cfg, batch.replace(images=filled))
    there = batch.segment_ids > 0
    np.testing.assert_array_equal(after[there], before[there])


def test_images_of_a_row_follow_one_another(experiments, tokenizer, source):
    cfg = experiments["unified"]
    batch = to_batch(cfg, source, [elements_of(cfg, tokenizer, source)[:3]])
    there = batch.image_token_index != NO_IMAGE
    assert batch.image_token_index[there].tolist() == list(range(3 * cfg.image_tokens))
    assert batch.segment_ids[there].tolist() == [2] * cfg.image_tokens + [3] * 2 * cfg.image_tokens
    seen = [
        batch.image_mask[0][batch.segment_ids[0] == segment].any(0).tolist()
        for segment in (1, 2, 3)
    ]
    assert seen == [[False] * 3, [True, False, False], [False, True, True]]
    assert not batch.image_mask[batch.segment_ids == 0].any()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(batches, others):
    return all(map(np.array_equal, jax.tree.leaves(batches), jax.tree.leaves(others)))


@pytest.fixture(scope="module", autouse=True)
def window():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "WINDOW_ROWS", 10)
        yield


@pytest.fixture(scope="module")
def cfg(experiments):
    """Batches of 4 rows, of which 12 are open at a time."""
    return replace(experiments["unified"], train=Train(batch_size=4))


@pytest.fixture(scope="module")
def expected(cfg, tokenizer):
    return take(pipeline.training_iterator(cfg, tokenizer), 9)


def test_rows_hold_whole_conversations_each_equally_often(cfg, expected, tokenizer, source):
    known = {
        tuple(e["tokens"].tolist()): i for i, e in enumerate(elements_of(cfg, tokenizer, source))
    }
    found = Counter()
    for batch in expected[:9]:
        assert batch.layout == PACKED
        for tokens, ids, positions in zip(
            batch.tokens, batch.segment_ids, batch.positions, strict=True
        ):
            # The slots of a segment follow each other, and so do its positions.
            steps = np.diff(ids)
            assert (np.diff(positions)[steps == 0] == 1)[ids[1:][steps == 0] > 0].all()
            assert set(steps[steps != 0]) <= {1, -ids.max()}
            found.update(
                known[tuple(tokens[ids == segment].tolist())] for segment in range(1, ids.max() + 1)
            )
    assert len(found) == 48
    assert max(found.values()) - min(found.values()) <= 1


@pytest.mark.parametrize("done", [0, 1, 4])
def test_the_ids_of_a_batch_are_those_of_its_conversations(done, cfg, expected, tokenizer, source):
    known = {
        source[i].id: e["tokens"].tolist()
        for i, e in enumerate(elements_of(cfg, tokenizer, source))
    }
    iterator = pipeline.training_iterator(cfg, tokenizer)
    take(iterator, done)
    state, batch = iterator.get_state(), expected[done]
    rows = zip(batch.tokens, batch.segment_ids, strict=True)
    held = [
        tokens[ids == segment].tolist()
        for tokens, ids in rows
        for segment in range(1, ids.max() + 1)
    ]
    assert [known[one] for one in pipeline.batch_ids(cfg, tokenizer, state)] == held


def test_rows_are_filled(expected):
    ids = np.concatenate([batch.segment_ids for batch in expected[:9]])
    assert np.sum(ids > 0) > 1.8 * np.sum(ids == 1)


@pytest.mark.parametrize(
    "done", [0, 1, 2, 3, 4]
)  # within a window of rows, at its end, and behind it
def test_a_restored_iterator_continues_exactly(cfg, expected, tokenizer, done):
    iterator = pipeline.training_iterator(cfg, tokenizer)
    take(iterator, done)
    state = iterator.get_state()
    other = pipeline.training_iterator(cfg, tokenizer)
    next(other)
    other.set_state(state)
    assert equal(take(other, 9 - done), expected[done:])


def test_the_seed_alone_decides(cfg, expected, tokenizer):
    other_threads = replace(cfg, data=replace(cfg.data, threads=0, prefetch=0))
    assert equal(take(pipeline.training_iterator(other_threads, tokenizer), 4), expected[:4])
    assert not equal(
        take(pipeline.training_iterator(replace(cfg, seed=1), tokenizer), 1), expected[:1]
    )


def test_processes_share_each_batch_of_one_process_and_any_number_of_them_continues(
    cfg, expected, tokenizer
):
    shares = [pipeline.training_iterator(cfg, tokenizer, i, 2) for i in range(2)]
    for batch in expected[:3]:
        for i, share in enumerate(shares):
            assert equal(next(share), jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch))
    assert shares[0].get_state() == shares[1].get_state()
    alone = pipeline.training_iterator(cfg, tokenizer)
    alone.set_state(shares[0].get_state())
    assert equal(take(alone, 2), expected[3:5])


def test_a_process_reads_the_images_of_its_rows_only(cfg, tokenizer, monkeypatch):
    read = []
    image = conversations.Conversations.image
    monkeypatch.setattr(
        conversations.Conversations, "image", lambda self, i: read.append(i) or image(self, i)
    )
    monkeypatch.setattr(tiling, "CACHE_BYTES", 0)
    cfg = replace(cfg, data=replace(cfg.data, prefetch=0))
    share = next(pipeline.training_iterator(cfg, tokenizer, 1, 2))
    assert len(read) == np.sum(share.image_mask.any(1))


def test_a_long_conversation_is_cut_and_too_many_images_are_refused(cfg, tokenizer):
    short = replace(cfg, data=replace(cfg.data, text_length=8))
    batch = next(pipeline.training_iterator(short, tokenizer))
    assert batch.tokens.shape == (4, 20)
    with pytest.raises(UserError, match="data.images_per_row 1 is too small: .* has 2 images"):
        pipeline.training_iterator(
            replace(cfg, data=replace(cfg.data, images_per_row=1)), tokenizer
        )


def test_text_alone_takes_no_images(experiments, tokenizer):
    cfg = replace(
        experiments["unified"], fusion=replace(experiments["unified"].fusion, kind="text_only")
    )
    batch = next(pipeline.training_iterator(cfg, tokenizer))
    assert batch.images is None
    assert not batch.image_mask.any()


TILED = {
    "tiles": 4,
    "tile_layouts": ((1, 1), (2, 2)),
    "num_global_layers": 1,
    "class_token": True,
    "keep_class_token": True,
}


def with_tiled_encoder(cfg):
    return validate(replace(cfg, vision=replace(cfg.vision, **TILED)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_with_tiles_is_given_each_image_as_its_first(kind, experiments, tokenizer):
    cut = with_tiled_encoder(experiments[kind])
    whole = replace(cut, vision=replace(cut.vision, tiles=1, tile_layouts=()))
    plain, tiles = (next(pipeline.training_iterator(cfg, tokenizer)) for cfg in (whole, cut))
    assert tiles.images.shape == (8, 3, 4, 16, 16, 3)
    np.testing.assert_array_equal(tiles.images[:, :, 0], plain.images)
    np.testing.assert_array_equal(tiles.image_mask[..., ::4], plain.image_mask)
    assert tiles.image_mask.sum() == plain.image_mask.sum()
    image, token = np.divmod(plain.image_token_index, whole.image_tokens)
    expected = np.where(
        plain.image_token_index == NO_IMAGE, NO_IMAGE, image * 4 * whole.image_tokens + token
    )
    np.testing.assert_array_equal(tiles.image_token_index, expected)
    assert (image.max() > 0) == cut.fusion.image_in_sequence, "a row has several images"


def test_of_an_encoder_with_tiles_the_tokens_of_an_images_first_tile_stand_in_the_sequence(
    experiments, tokenizer
):
    cfg = with_tiled_encoder(experiments["unified"])
    batch, params, size = (
        next(pipeline.training_iterator(cfg, tokenizer)),
        random_params(cfg),
        cfg.image_tokens,
    )
    read = jax.jit(
        lambda batch: VLM(cfg.model).apply({"params": params}, batch, method="image_tokens")
    )
    for made, slots, mask in zip(
        np.asarray(read(batch)), batch.image_token_index, batch.image_mask, strict=True
    ):
        shown = mask.any(0)[::4]
        placed = made[slots[slots != NO_IMAGE]]
        np.testing.assert_array_equal(
            placed, made.reshape(3, 4, size, -1)[shown, 0].reshape(placed.shape)
        )
