"""The whole model: what may reach a token's logits and what may not, for every fusion style."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.linen import meta

from vlm_jax import axes
from vlm_jax.config import Experiment, Fusion, Projector, Rope
from vlm_jax.data import pipeline, text, tiles
from vlm_jax.nn.vlm import empty_cache, init_params
from vlm_jax.structs import PADDING, Batch
from vlm_jax.testing import KINDS, random_batch, tiny
from vlm_jax.train.optim import PARTS, part_of

WITH_MEMORY = ("cross_attention", "encoder_decoder")


def raw_patches(cfg, newline=False):
    """Without an encoder, which half of the styles below have: it takes half of the time to compile."""
    return replace(cfg, vision=replace(cfg.vision, kind="none", newline_token=newline))


def in_tiles(cfg):
    """Images of at most two tiles, with a thumbnail and tags."""
    return replace(cfg, vision=replace(cfg.vision, tiles=2))


EXPERIMENTS = {
    "unified": tiny("unified"),
    "fuyu": raw_patches(tiny("unified"), newline=True),
    "cross_attention": raw_patches(tiny("cross_attention")),
    "encoder_decoder": tiny("encoder_decoder"),
    "hybrid": raw_patches(in_tiles(tiny("hybrid"))),
}
# Four training rows wherever possible: one shape, compiled once a style.
every_style = pytest.mark.parametrize("cfg", EXPERIMENTS.values(), ids=EXPERIMENTS)
with_memory = pytest.mark.parametrize("cfg", [EXPERIMENTS[kind] for kind in WITH_MEMORY], ids=WITH_MEMORY)


def decoder(cfg, **settings):
    return replace(cfg, decoder=replace(cfg.decoder, **settings))


def pair(prompt=4, answer=2, seed=0):
    ids = np.random.default_rng(seed).integers(len(text.SPECIALS), 300, prompt + answer).tolist()
    return ids[:prompt], ids[prompt:]


def rows(cfg, *pairs_of_rows, seed=0) -> Batch:
    """A training row for every list of pairs, all about one image of as many tiles as there may be."""
    tiles_of_it = cfg.vision.cut_tiles
    packed = [text.pack_row(cfg, pairs, tiles_of_it) for pairs in pairs_of_rows]
    image = tiles.stacked([picture(cfg, tiles_of_it, np.random.default_rng(seed))], cfg.vision)
    fields = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    return Batch(**fields, images=np.broadcast_to(image, (len(packed), *image.shape)))


def picture(cfg, tiles_of_it, rng):
    """So many tiles side by side."""
    side = cfg.vision.image_size_px
    return rng.uniform(-1, 1, (side, tiles_of_it * side, 3)).astype(np.float32)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-4)


def differ(a, b):
    """Every token's logits are visibly others."""
    return (np.abs(np.subtract(a, b)).max(-1) > 1e-3).all()


class Letters:
    """A tokenizer of bytes."""

    def encode(self, text):
        return list(text.encode())


def pictures(cfg, images_of_each=(2, 0)):
    """Images for every row, the last of each of as many tiles as there may be, those before it of one."""
    rng, most = np.random.default_rng(1), cfg.vision.cut_tiles
    return [[picture(cfg, 1 if i < n - 1 else most, rng) for i in range(n)] for n in images_of_each]


def prompts(cfg, images_of_each=(2, 0), questions=("two?", "no image at all?")):
    """A left-padded batch of questions, with as many images each as asked for."""
    return pipeline.prompt_batch(cfg, Letters(), pictures(cfg, images_of_each), questions)


def without_images(batch: Batch) -> Batch:
    return batch.replace(images=None, image_mask=batch.image_mask[..., :0])


# What a token sees


@every_style
def test_nothing_after_a_token_changes_its_logits(cfg, forward, random_params):
    """Row t has other tokens after token t, for every t, four rows at a time."""
    params, length = random_params(cfg), cfg.row_length
    row = rows(cfg, *[[pair(prompt=cfg.data.text_length - 2)]] * 4)
    logits, slots, is_text = forward(cfg, params, row).logits[0], np.arange(length), row.image_slots[0] < 0
    for start in range(0, length, 4):
        t = np.arange(start, start + 4)[:, None]
        changed = (slots > t) & is_text
        other = row.replace(tokens=np.where(changed, (row.tokens + t + 1) % 300, row.tokens))
        other_logits = forward(cfg, params, other).logits
        kept = np.broadcast_to(slots <= t, changed.shape)
        close(other_logits[kept], np.broadcast_to(logits, other_logits.shape)[kept])
        assert differ(other_logits[changed], np.broadcast_to(logits, other_logits.shape)[changed])


@every_style
def test_padding_changes_nothing(cfg, forward, random_params):
    """Whatever stands in its slots; rows of several lengths one by one, below, have several amounts of it."""
    batch, params = random_batch(cfg), random_params(cfg)
    empty = batch.segment_ids == PADDING
    assert empty.any()
    noisy = batch.replace(
        tokens=np.where(empty, 77, batch.tokens),
        positions=np.where(empty, 5, batch.positions),
        branch_ids=np.where(empty, 1, batch.branch_ids),
        image_mask=batch.image_mask | empty[..., None],
    )
    close(forward(cfg, params, noisy).logits[~empty], forward(cfg, params, batch).logits[~empty])


@every_style
def test_a_packed_row_has_the_logits_of_one_question_a_row(cfg, forward, random_params):
    pairs = [pair(4, 2, seed=0), pair(3, 1, seed=1), pair(5, 2, seed=2)]
    batch = rows(cfg, pairs, *([one] for one in pairs))
    logits = np.asarray(forward(cfg, random_params(cfg), batch).logits)
    for i in range(3):
        packed, alone = batch.branch_ids[0] == i + 1, batch.branch_ids[i + 1] == 1
        np.testing.assert_array_equal(batch.tokens[0][packed], batch.tokens[i + 1][alone])
        close(logits[0][packed], logits[i + 1][alone])


@every_style
def test_another_question_in_a_packed_row_changes_nothing(cfg, forward, random_params):
    first, last = pair(seed=0), pair(seed=1)
    batch = rows(cfg, *([first, pair(seed=2 + i), last] for i in range(4)))
    logits = np.asarray(forward(cfg, random_params(cfg), batch).logits)
    changed = batch.branch_ids[0] == 2
    assert not np.array_equal(batch.tokens[0][changed], batch.tokens[1][changed])
    others = ~changed & (batch.segment_ids[0] != PADDING)
    close(logits[0][others], logits[1][others])
    assert differ(logits[0][changed], logits[1][changed])


def documents(cfg):
    """One row of two documents with an image each, and the two rows that hold one of them each."""
    one, two = rows(cfg, [pair()]), rows(cfg, [pair(seed=1)], seed=1)

    def joined(a, b):
        return np.concatenate([a, b], axis=1)

    is_image, views = two.image_slots >= 0, cfg.vision.views
    moved = two.image_slots + views * cfg.image_tokens
    fields = {name: joined(getattr(one, name), getattr(two, name)) for name in ("tokens", "positions", "branch_ids")}
    both = Batch(
        **fields,
        segment_ids=joined(one.segment_ids, 2 * two.segment_ids),
        image_slots=joined(one.image_slots, np.where(is_image, moved, two.image_slots)),
        image_mask=joined(
            np.pad(one.image_mask, ((0, 0), (0, 0), (0, views))), np.pad(two.image_mask, ((0, 0), (0, 0), (views, 0)))
        ),
        images=joined(one.images, two.images),
    )
    alone = jax.tree.map(lambda *x: np.concatenate(x), one, two, one, two)
    return both, alone


@every_style
def test_two_images_in_a_row_are_two_rows(cfg, forward, random_params):
    both, alone = documents(cfg)
    params, there = random_params(cfg), both.segment_ids[0] != PADDING
    logits = forward(cfg, params, both).logits[0]
    close(logits[there], forward(cfg, params, alone).logits[:2].reshape(logits.shape)[there])


# The image


@every_style
def test_the_image_matters_where_it_is_read(cfg, forward, random_params):
    batch, params = random_batch(cfg), random_params(cfg)
    reads = batch.segment_ids != PADDING
    logits, other = (forward(cfg, params, b).logits for b in (batch, batch.replace(images=-batch.images)))
    assert differ(logits[reads], other[reads])


def test_a_text_only_model_looks_at_no_image_that_it_is_given(forward, random_params):
    cfg = tiny("text_only")
    batch, params = random_batch(cfg), random_params(cfg)
    np.testing.assert_array_equal(*(forward(cfg, params, b).logits for b in (batch, without_images(batch))))


def gates_of(params):
    flat = traverse_util.flatten_dict(params)
    return {path: value for path, value in flat.items() if path[-1].endswith("gate")}


def test_the_gates_of_a_new_model_are_closed():
    cfg = tiny("cross_attention")
    gates = jax.jit(lambda key: list(gates_of(meta.unbox(init_params(cfg, key))).values()))(jax.random.key(0))
    assert len(gates) == 2
    assert not np.any(gates)


def test_with_closed_gates_cross_attention_is_the_text_only_decoder_bit_for_bit(forward, random_params):
    """The decoder without cross-attention is `unified` given text alone."""
    cfg, plain, batch = tiny("cross_attention"), tiny("unified"), random_batch(tiny("cross_attention"))
    flat = traverse_util.flatten_dict(random_params(cfg))
    own = {path: value for path, value in flat.items() if part_of(path) != "cross_attention"}
    expected = forward(plain, traverse_util.unflatten_dict(own), without_images(batch)).logits
    closed = flat | {path: np.zeros_like(value) for path, value in gates_of(random_params(cfg)).items()}
    np.testing.assert_array_equal(forward(cfg, traverse_util.unflatten_dict(closed), batch).logits, expected)
    there = batch.segment_ids != PADDING
    assert differ(forward(cfg, random_params(cfg), batch).logits[there], expected[there])


@with_memory
def test_a_row_that_reads_no_image_is_text_only_even_with_open_gates(cfg, forward, random_params):
    batch, params = random_batch(cfg), random_params(cfg)
    alone = forward(cfg, params, without_images(batch)).logits
    blind = batch.replace(image_mask=np.zeros_like(batch.image_mask))
    np.testing.assert_allclose(forward(cfg, params, blind).logits, alone, rtol=1e-5, atol=1e-5)
    there = batch.segment_ids != PADDING
    assert differ(forward(cfg, params, batch).logits[there], alone[there])


@with_memory
def test_a_token_reads_only_the_images_of_its_mask(cfg, forward, random_params):
    batch, params = prompts(cfg, (2,), ("which one?",)), random_params(cfg)
    first = np.arange(batch.tokens.shape[1]) < 4
    batch = batch.replace(image_mask=batch.image_mask & np.stack([first, ~first], axis=-1))
    batch = batch.replace(branch_ids=np.where(first, 1, 2)[None].astype(np.int32))  # what it read, it tells no other
    other = batch.replace(images=batch.images * np.array([1, -1], np.float32)[:, None, None, None])
    logits, changed = (np.asarray(forward(cfg, params, b).logits[0]) for b in (batch, other))
    np.testing.assert_allclose(changed[first], logits[first], rtol=1e-5, atol=1e-5)
    assert differ(changed[~first], logits[~first])


# Caches and batches


@every_style
def test_cached_is_uncached_and_compiled_once(cfg, forward, random_params):
    """Left-padded prompts of two lengths; three tokens follow one at a time."""
    new, params = 3, random_params(cfg)
    whole = prompts(cfg)
    length = whole.tokens.shape[1] - new
    text_fields = whole.replace(images=None)
    prompt = jax.tree.map(lambda x: x[:, :length], text_fields).replace(images=whole.images)
    out = forward(cfg, params, prompt, empty_cache(cfg, prompt, new))
    logits = [out.logits]
    for i in range(new):
        token = jax.tree.map(lambda x, at=length + i: x[:, at : at + 1], text_fields)
        out = forward(cfg, params, token, out.cache)
        logits.append(out.logits)
        compiled = forward._cache_size() if i == 0 else compiled
    assert forward._cache_size() == compiled
    there = whole.segment_ids != PADDING
    close(jnp.concatenate(logits, axis=1)[there], forward(cfg, params, whole).logits[there])


@every_style
def test_a_batch_of_mixed_lengths_and_image_counts_is_one_by_one(cfg, forward, random_params):
    batch, params = prompts(cfg), random_params(cfg)
    logits = forward(cfg, params, batch).logits
    for i, (images, question) in enumerate(zip(pictures(cfg), ["two?", "no image at all?"])):
        alone = pipeline.prompt_batch(cfg, Letters(), [images], [question])
        close(logits[i, -alone.tokens.shape[1] :], forward(cfg, params, alone).logits[0])


def test_a_second_batch_of_the_same_shape_compiles_nothing(forward, random_params):
    cfg = tiny()
    forward(cfg, random_params(cfg), random_batch(cfg, seed=1))
    compiled = forward._cache_size()
    forward(cfg, random_params(cfg), random_batch(cfg, seed=2))
    assert forward._cache_size() == compiled


# Settings


SETTINGS = {
    "learned positions": {"positions": "learned"},
    "rope on half a head": {"rope": Rope(fraction=0.5)},
    "another rope.theta": {"rope": Rope(theta=100.0)},
    "free head": {"tied_head": False},
    "one kv head": {"kv_heads": 1},
    "as many kv heads as heads": {"kv_heads": 0},
    "wide heads": {"head_dim": 16},
    "rmsnorm": {"norm": "rmsnorm"},
    "gated mlp": {"gated_mlp": True},
    "no biases": {"qkv_bias": False, "out_bias": False, "mlp_bias": False},
    "silu": {"activation": "silu"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_of_the_decoder_runs_and_changes_the_logits(settings, forward, random_params):
    base = decoder(tiny("cross_attention"), depth=1)
    cfg, batch = decoder(base, **settings), without_images(random_batch(base))
    there = batch.segment_ids != PADDING
    logits = forward(cfg, random_params(cfg), batch).logits[there]
    assert np.isfinite(logits).all()
    assert np.abs(logits - forward(base, random_params(base), batch).logits[there]).max() > 1e-3


def test_positions_tell_equal_tokens_apart_under_both_schemes(forward, random_params):
    for positions in ("rope", "learned"):
        cfg = decoder(tiny("cross_attention"), positions=positions, depth=1)
        a, b = [11, 22, 33, 44, 55, 66], [22, 11, 33, 44, 55, 66]
        batch = without_images(rows(cfg, [(a[:5], a[5:])], [(b[:5], b[5:])]))
        logits = forward(cfg, random_params(cfg), batch).logits[:, 5]
        assert differ(logits[:1], logits[1:])


# Parameters


def all_sorts() -> Iterator[Experiment]:
    for kind in KINDS:
        yield tiny(kind)
        yield tiny(kind, fusion=Fusion(kind=kind, gated=False, cross_layers=(1,)))
    for projector in ("mlp", "pixel_shuffle", "average_pool", "resampler"):
        yield tiny(projector=Projector(kind=projector, heads=4))
    yield EXPERIMENTS["fuyu"]
    cfg = decoder(tiny(), positions="learned", tied_head=False, gated_mlp=True, norm="rmsnorm")
    yield cfg
    yield replace(cfg, vision=replace(cfg.vision, class_token=True, pre_norm=True, patch_embed="conv"))


def boxes(cfg):
    boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return traverse_util.flatten_dict(boxed)


@pytest.mark.parametrize("cfg", list(all_sorts()), ids=lambda cfg: f"{cfg.fusion.kind}-{cfg.projector.kind}")
def test_every_parameter_has_a_letter_for_each_dimension_and_belongs_to_one_part(cfg):
    found = boxes(cfg)
    for path, box in found.items():
        assert isinstance(box, axes.Lettered), path
        letters = box.letters.split()
        assert len(letters) == len(box.value.shape), path
        assert set(letters) <= set(axes.ALPHABET), path
        assert ("layers" in path) == (letters[0] == "L"), path
        assert part_of(path) in PARTS, path
    crossing = {path for path in found if part_of(path) == "cross_attention"}
    assert bool(crossing) == cfg.fusion.image_in_memory
    assert {part_of(path) for path in found} >= {"projector", "decoder"}


def test_every_letter_has_one_size_in_the_decoder():
    """Two letters swapped in a parameter would show as a size that is not the letter's."""
    cfg = decoder(tiny("cross_attention"), head_dim=7, positions="learned")
    d = cfg.decoder
    sizes = {"V": 300, "D": 32, "S": 64, "N": 4, "K": 2, "H": 7, "F": 64, "L": d.depth, "1": 1}
    for path, box in boxes(cfg).items():
        if path[0] == "decoder":
            assert box.value.shape == tuple(sizes[letter] for letter in box.letters.split()), path
