"""A tiny model of every fusion kind learns 8 examples exactly; shuffled images give chance.

Where hybrid cuts images into tiles, their thumbnails are all equal, so that only the tiles differ.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from vlm_jax.config import Data, Optim
from vlm_jax.data import text, tiling
from vlm_jax.data.tokenizer import EOS
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import Batch, State
from vlm_jax.testing import random_params, variants_and_tiles
from vlm_jax.train import optim
from vlm_jax.train.step import train_step

QUESTION = [10, 11, 12]  # one for all: it tells nothing about the answer
ANSWERS = [[20, 21], [30, 31], [40, 41], [50, 51]] * 2  # of the eight images
STEPS = 150


def stacked(rows, images) -> Batch:
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]}, images=images)


def pictures(vision) -> np.ndarray:
    """Eight images, each of as many tiles side by side as there may be: all views of each."""
    side, count = vision.image_size_px, vision.cut_tiles
    pixels = np.random.default_rng(0).uniform(-1, 1, (8, side, count * side, 3)).astype(np.float32)
    if count > 1:
        pixels[:, :, 1::2] = -pixels[:, :, ::2]  # a thumbnail is the mean of neighbors
    return np.stack([tiling.stack_views([image], vision) for image in pixels])


def batch_of(cfg, images) -> Batch:
    """The question about each image, with its answer."""
    count = cfg.vision.cut_tiles
    return stacked(
        [text.pack_row(cfg, [(QUESTION, [*answer, EOS])], count) for answer in ANSWERS], images
    )


def learned(cfg, images):
    """The parameters after `STEPS` steps over the eight examples."""
    batch = batch_of(cfg, images)
    params = random_params(cfg)
    state = State(
        jax.numpy.int32(0),
        params,
        optim.optimizer(cfg).init(optim.split(params, cfg.optim)[0]),
    )
    step = jax.jit(lambda state, batch: train_step(cfg, state, batch), donate_argnums=0)
    for _ in range(STEPS):
        state, _ = step(state, batch)
    return state.params


EVERY = variants_and_tiles()


@pytest.mark.parametrize("cfg", EVERY.values(), ids=EVERY)
def test_eight_examples_are_learned_and_lost_when_the_images_are_shuffled(cfg):
    train = replace(cfg.train, steps=STEPS)
    cfg = replace(
        cfg, data=Data(text_length=8), train=train, optim=Optim(learning_rate=5e-3, warmup_steps=20)
    )
    images = pictures(cfg.vision)
    params = learned(cfg, images)

    forward = jax.jit(lambda params, batch: VLM(cfg.model).apply({"params": params}, batch).logits)

    def exact_match(images):
        """Teacher forcing: a right answer is the most likely token at each of its places."""
        batch = batch_of(cfg, images)
        is_right = np.argmax(forward(params, batch), axis=-1) == batch.targets
        return np.mean((is_right | (batch.loss_weights == 0)).all(axis=1))

    assert (batch_of(cfg, images).loss_weights > 0).sum() == 8 * len([*ANSWERS[0], EOS])
    assert exact_match(images) == 1
    shuffled = [exact_match(np.roll(images, shift, axis=0)) for shift in range(1, 8)]
    assert np.mean(shuffled) <= 1 / 4
