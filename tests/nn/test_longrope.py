"""LongRoPE: the factors depend on the length of the whole text, with a cache as without one."""

from dataclasses import replace

import numpy as np
import pytest

from vlm_jax.config import Projector, Rope
from vlm_jax.data import questions
from vlm_jax.nn.vlm import empty_cache
from vlm_jax.structs import PADDING, Batch, image_arrays, map_token_fields, without_images
from vlm_jax.testing import tiny

# Tokens that follow the prompt one at a time; the third is the first beyond the original length.
NEW = 5
BEYOND = 3


class Letters:
    """A tokenizer of bytes."""

    def encode(self, text):
        return list(text.encode())


def longrope(kind):
    """An experiment with an original length of `BEYOND` tokens less than its prompts.

    `hybrid` has DeepStack, in the sequence and in the memory.
    """
    cfg = tiny(kind)
    if kind == "hybrid":
        vision = replace(cfg.vision, max_patches=4, patch_square=2, deepstack_layers=(1,))
        cfg = replace(cfg, vision=vision, projector=Projector("pixel_shuffle", factor=2))
    rope = Rope(
        scaling="longrope",
        factor=4.0,
        original_positions=prompts(cfg).tokens.shape[1] - BEYOND,
        short_factors=(1.0, 1.1, 1.2, 1.3),
        long_factors=(1.5, 3.0, 6.0, 9.0),
    )
    return replace(cfg, decoder=replace(cfg.decoder, rope=rope))


def prompts(cfg) -> Batch:
    """Two left-padded questions about an image each."""
    side = cfg.vision.image_size_px
    # Every image has four patches.
    images = np.random.default_rng(0).uniform(-1, 1, (2, 1, side, side, 3)).astype(np.float32)
    return questions.prompt_batch(cfg, Letters(), list(images), ["is it red?", "what shape is it?"])


def cut(batch: Batch, length: int) -> Batch:
    """The first tokens, then padding, so that every length has the same shapes."""
    is_kept = np.arange(batch.tokens.shape[1]) < length
    return batch.replace(
        segment_ids=np.where(is_kept, batch.segment_ids, PADDING),
        positions=np.where(is_kept, batch.positions, 0),
    )


# Image tokens in the sequence are rotated, those in the memory are not; `hybrid` has both.
@pytest.mark.parametrize("kind", ["unified", "hybrid"])
def test_cached_is_uncached_on_both_sides_of_the_original_length(kind, forward, random_params):
    cfg = longrope(kind)
    params, whole = random_params(cfg), prompts(cfg)
    length = whole.tokens.shape[1]
    text = without_images(whole)
    prompt = map_token_fields(lambda x: x[:, : length - NEW], text).replace(**image_arrays(whole))
    out = forward(cfg, params, prompt, empty_cache(cfg.model, prompt, NEW))
    for at in range(length - NEW, length):
        token = map_token_fields(lambda x, at=at: x[:, at : at + 1], text)
        out = forward(cfg, params, token, out.cache)
        uncached = forward(cfg, params, cut(whole, at + 1)).logits[:, at]
        np.testing.assert_allclose(out.logits[:, 0], uncached, atol=2e-4, err_msg=f"token {at}")


def test_the_first_token_beyond_the_original_length_changes_those_before(forward, random_params):
    cfg = longrope("unified")
    params, whole = random_params(cfg), prompts(cfg)
    original = cfg.decoder.rope.original_positions
    short = forward(cfg, params, cut(whole, original)).logits
    long = forward(cfg, params, cut(whole, original + 1)).logits
    changed = np.abs(short - long).max(-1) > 1e-3
    # The first token attends to itself alone, so its rotation makes no difference.
    sees_others = (whole.segment_ids != PADDING) & (whole.positions > 0)
    assert changed[:, :original][sees_others[:, :original]].all()
