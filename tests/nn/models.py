"""Whole models of every fusion style, and rows and prompts for them, as several tests want them."""

from dataclasses import replace

import numpy as np
import pytest

from vlm_jax.data import questions, text, tiling
from vlm_jax.data.tokenizer import SPECIALS
from vlm_jax.structs import Batch
from vlm_jax.testing import tiny

WITH_MEMORY = ("cross_attention", "encoder_decoder")


def raw_patches(cfg, newline=False):
    """Without an encoder, which takes half of the compile time: half of the styles below."""
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
with_memory = pytest.mark.parametrize(
    "cfg", [EXPERIMENTS[kind] for kind in WITH_MEMORY], ids=WITH_MEMORY
)


def decoder(cfg, **settings):
    return replace(cfg, decoder=replace(cfg.decoder, **settings))


def pair(prompt=4, answer=2, seed=0):
    ids = np.random.default_rng(seed).integers(len(SPECIALS), 300, prompt + answer).tolist()
    return ids[:prompt], ids[prompt:]


def rows(cfg, *pairs_of_rows, seed=0) -> Batch:
    """A training row for every list of pairs, all about one image with the most tiles."""
    tiles_of_it = cfg.vision.cut_tiles
    packed = [text.pack_row(cfg, pairs, tiles_of_it) for pairs in pairs_of_rows]
    image = tiling.stack_views([picture(cfg, tiles_of_it, np.random.default_rng(seed))], cfg.vision)
    fields = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    return Batch(**fields, images=np.broadcast_to(image, (len(packed), *image.shape)))


def picture(cfg, tiles_of_it, rng):
    """An image of `tiles_of_it` tiles side by side."""
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


def pictures(cfg, images_of_each):
    """Images for every row: the last with the most tiles, those before it with one tile."""
    rng = np.random.default_rng(1)
    images = []
    for count in images_of_each:
        tiles = [1] * (count - 1) + [cfg.vision.cut_tiles] if count else []
        images.append([picture(cfg, n, rng) for n in tiles])
    return images


def prompts(cfg, images, asked, length=None, **options):
    """A left-padded batch of questions, in the shape of four training rows."""
    length = length or cfg.row_length
    return questions.prompt_batch(cfg, Letters(), images, asked, length, **options)


def without_images(batch: Batch) -> Batch:
    return batch.replace(images=None, image_mask=batch.image_mask[..., :0])
