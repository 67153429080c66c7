"""Attention of the answers of an evaluation, with the boxes of the objects they are about."""

from collections.abc import Sequence

import jax
import numpy as np

from vlm_jax import axes
from vlm_jax.config import Experiment
from vlm_jax.data import questions
from vlm_jax.data.builders.boxes import Box
from vlm_jax.data.questions import Question
from vlm_jax.data.tiling import grid_shape
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.batches import batch_indices
from vlm_jax.infer.look.maps import AttentionMaps, look
from vlm_jax.infer.look.pictures import place_views
from vlm_jax.infer.metrics.grounding import Attention
from vlm_jax.nn.models import build_model


def attention_on_objects(
    cfg: Experiment,
    params,
    tokenizer: Tokenizer,
    examples: Sequence[Question],
    image_sources: Sequence[Question],
    boxes: Sequence[Box | None],
) -> list[Attention | None]:
    """Returns the attention of the right answer to each question; None without a box.

    The right answers are read in one forward pass. They are the same for all models, and the token
    that predicts the first one has seen the question alone.
    """
    model, mesh = build_model(cfg), axes.make_mesh(cfg.mesh)
    attention: list[Attention | None] = [None] * len(examples)
    with_box = [i for i, box in enumerate(boxes) if box is not None]
    length = questions.row_length(cfg, tokenizer, [examples[i] for i in with_box])
    length += max(len(tokenizer.encode(examples[i].answer)) + 1 for i in with_box)
    size = cfg.eval.batch_size
    for numbers in batch_indices(len(with_box), size):
        indices = [with_box[number] for number in numbers]
        batch = questions.question_batch(
            cfg,
            tokenizer,
            [examples[i] for i in indices],
            [image_sources[i] for i in indices],
            length,
            size,
            [examples[i].answer for i in indices],
        )
        with jax.set_mesh(mesh):
            rows = look(model, params, batch)
        for i, maps in zip(indices, rows):
            attention[i] = _measure(maps, image_sources[i], cfg, boxes[i], tokenizer.eos_id)
    return attention


def _measure(
    maps: AttentionMaps, question: Question, cfg: Experiment, box: Box, eos_id: int
) -> Attention:
    """Returns the attention of the answer's tokens, without its end, on the first image."""
    count = len(maps.tokens)
    if count > 1 and maps.tokens[-1] == eos_id:
        count -= 1
    weights = maps.weights[:count].mean((0, 2))  # (L, I, rows, columns)
    pixels, *_ = question.images()
    grid = grid_shape(pixels, cfg.vision)
    joined = place_views(cfg.vision, pixels, grid).join(weights)
    if not cfg.vision.is_native:
        joined = _without_padding(joined, pixels.shape[:2], grid, cfg)
    return Attention(maps.layers, joined, box)


def _without_padding(
    maps: np.ndarray, shape: tuple[int, int], grid: tuple[int, int], cfg: Experiment
) -> np.ndarray:
    """Cuts the padding of a grid of tiles off maps (..., rows, columns), to whole patches.

    `shape` is the (height, width) in px of the image in the middle of the grid.
    """
    margins = []
    for length_px, tiles in zip(shape, grid):
        margin_px = (tiles * cfg.vision.image_size_px - length_px) // 2
        margins.append(margin_px // cfg.vision.patch_size_px)
    top, left = margins
    rows, columns = maps.shape[-2:]
    return maps[..., top : rows - top, left : columns - left]
