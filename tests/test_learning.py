"""A tiny model of every fusion kind learns 8 examples exactly; shuffled images give chance.

Where hybrid cuts images into tiles, their thumbnails are all equal, so that only the tiles differ.
At native resolution (`pytest -m slow`) the images have three shapes, which do not tell the answer.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from vlm_jax.config import Data, Optim, Projector
from vlm_jax.data import native, text, tiling
from vlm_jax.data.tokenizer import EOS
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import Batch, State
from vlm_jax.testing import KINDS, random_params, tiny, variants_and_tiles
from vlm_jax.train import optim
from vlm_jax.train.step import train_step

QUESTION = [10, 11, 12]  # one for all: it tells nothing about the answer
ANSWERS = [[20, 21], [30, 31], [40, 41], [50, 51]] * 2  # of the eight images
STEPS = 150
SHAPES_PX = [(16, 16), (16, 32), (32, 16)]  # of images at native resolution


def at_native_resolution(kind):
    cfg = tiny(kind, projector=Projector("pixel_shuffle", factor=2))
    return replace(cfg, vision=replace(cfg.vision, max_patches=8, patch_square=2))


def pictures(vision) -> list[np.ndarray]:
    """Eight images, each of as many tiles side by side as there may be."""
    side, count = vision.image_size_px, vision.cut_tiles
    shapes = SHAPES_PX if vision.is_native else [(side, count * side)]
    rng = np.random.default_rng(0)
    pixels = []
    for number in range(8):
        image = rng.uniform(-1, 1, (*shapes[number % len(shapes)], 3)).astype(np.float32)
        if count > 1:
            image[:, 1::2] = -image[:, ::2]  # a thumbnail is the mean of neighbors
        pixels.append(image)
    return pixels


def batch_of(cfg, pixels) -> Batch:
    """The question about each image, with its answer."""
    rows = []
    for image, answer in zip(pixels, ANSWERS, strict=True):
        tiles = tiling.describe_tiles(image, cfg.vision)
        rows.append(text.pack_row(cfg, [(QUESTION, [*answer, EOS])], tiles))
    batch = Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    images = [[image] for image in pixels]
    if cfg.vision.is_native:
        packed = native.pack_images(images, cfg.vision, cfg.patches_per_row)
        return batch.replace(**packed._asdict())
    return batch.replace(images=np.stack([tiling.stack_views(row, cfg.vision) for row in images]))


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


CASES = [pytest.param(cfg, id=name) for name, cfg in variants_and_tiles().items()]
for kind in KINDS:
    name = f"{kind} at native resolution"
    CASES.append(pytest.param(at_native_resolution(kind), id=name, marks=pytest.mark.slow))


@pytest.mark.parametrize("cfg", CASES)
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
    shuffled = [exact_match(images[shift:] + images[:shift]) for shift in range(1, 8)]
    assert np.mean(shuffled) <= 1 / 4
