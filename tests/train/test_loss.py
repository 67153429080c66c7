"""Cross-entropy is a pair (sum, count); packing questions into one row changes neither."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.data import text
from vlm_jax.nn.vlm import VLM, example_batch
from vlm_jax.structs import Batch
from vlm_jax.testing import random_params, tiny
from vlm_jax.train.loss import cross_entropy

VOCAB = 7


def scored(targets, weights) -> Batch:
    batch = example_batch(tiny().model, rows=len(targets), length=len(targets[0]))
    return batch.replace(
        targets=jnp.asarray(targets), loss_weights=jnp.asarray(weights, jnp.float32)
    )


def random_logits(rows=2, length=5, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, length, VOCAB)) * 3


def test_uniform_logits_cost_log_v_a_scored_token():
    batch = scored([[1, 2, 3, 4]], [[0, 1, 1, 1]])
    total, count = cross_entropy(jnp.zeros((1, 4, VOCAB)), batch)
    assert count == 3
    np.testing.assert_allclose(total, 3 * math.log(VOCAB), rtol=1e-6)


def test_the_sum_is_that_of_minus_log_p_by_hand():
    batch = scored([[0, 1, 2]], [[1, 0, 1]])
    probabilities = np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]], np.float32)
    total, count = cross_entropy(jnp.log(probabilities), batch)
    assert count == 2
    np.testing.assert_allclose(total, -math.log(0.5) - math.log(0.6), rtol=1e-6)


def test_a_weight_counts_as_so_many_tokens():
    logits, targets = random_logits(1, 3), [[1, 2, 3]]
    single = [cross_entropy(logits, scored(targets, [row]))[0] for row in np.eye(3)]
    total, count = cross_entropy(logits, scored(targets, [[0.5, 0, 2]]))
    assert count == 2.5
    np.testing.assert_allclose(total, 0.5 * single[0] + 2 * single[2], rtol=1e-6)


def test_what_is_not_scored_changes_nothing():
    logits, weights = random_logits(1, 4), [[1, 0, 1, 0]]
    other_logits = logits.at[:, 1::2].multiply(-5)
    assert cross_entropy(logits, scored([[1, 2, 3, 4]], weights)) == cross_entropy(
        other_logits, scored([[1, 6, 3, 0]], weights)
    )


def test_the_pairs_of_two_halves_add_up_to_that_of_the_whole():
    logits, targets, weights = random_logits(4), np.arange(20).reshape(4, 5) % VOCAB, np.tri(4, 5)
    whole = cross_entropy(logits, scored(targets, weights))
    halves = [
        cross_entropy(logits[s], scored(targets[s], weights[s])) for s in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(whole, np.sum(halves, axis=0), rtol=1e-6)


def test_adding_a_number_to_all_logits_changes_nothing():
    logits, batch = random_logits(), scored([[1, 2, 3, 4, 5]] * 2, np.ones((2, 5)))
    np.testing.assert_allclose(
        cross_entropy(logits + 50, batch), cross_entropy(logits, batch), rtol=1e-5
    )


def test_narrow_logits_are_summed_in_float32():
    logits, batch = (
        random_logits().astype(jnp.bfloat16),
        scored([[1, 2, 3, 4, 5]] * 2, np.ones((2, 5))),
    )
    total, count = cross_entropy(logits, batch)
    assert total.dtype == count.dtype == jnp.float32
    assert total == cross_entropy(logits.astype(jnp.float32), batch)[0]


def test_logits_of_a_thousand_give_no_infinity():
    logits = jnp.full((1, 1, VOCAB), -1e4).at[0, 0, 2].set(1e4)
    assert cross_entropy(logits, scored([[2]], [[1]]))[0] == 0
    assert cross_entropy(logits, scored([[3]], [[1]]))[0] == 2e4


def stacked(rows, images) -> Batch:
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]}, images=images)


@pytest.mark.parametrize("kind", ["unified", "hybrid"])
def test_a_packed_row_has_the_loss_and_logits_of_one_question_a_row(kind):
    """tests/nn/test_vlm.py has the logits of every style."""
    cfg, rng = tiny(kind), np.random.default_rng(0)
    pairs = [
        (list(rng.integers(4, 300, p)), list(rng.integers(4, 300, a)))
        for p, a in ((5, 2), (3, 1), (6, 3))
    ]
    image = rng.uniform(-1, 1, (1, 1, 16, 16, 3)).astype(np.float32)
    images = np.repeat(image, 3, axis=0)
    packed = stacked(
        [text.pack_row(cfg, pairs)] * 3, images
    )  # three times, so that both have one shape
    single = stacked([text.pack_row(cfg, [pair]) for pair in pairs], images)
    params = random_params(cfg)
    forward = jax.jit(lambda params, batch: VLM(cfg.model).apply({"params": params}, batch).logits)
    packed_logits, single_logits = forward(params, packed), forward(params, single)

    total, count = cross_entropy(packed_logits, packed)
    np.testing.assert_allclose(
        (total / 3, count / 3), cross_entropy(single_logits, single), rtol=1e-5
    )
    assert count == 3 * 6
    start, trunk = cfg.image_slots_in_row, cfg.image_slots_in_row
    for i, length in enumerate(len(prompt) + len(answer) for prompt, answer in pairs):
        np.testing.assert_allclose(
            packed_logits[0, start : start + length],
            single_logits[i, trunk : trunk + length],
            atol=2e-5,
        )
        start += length
    other = forward(params, packed.replace(images=-images))
    assert not np.allclose(other, packed_logits, atol=1e-3), (
        "the image is not read: the test would show nothing"
    )
