"""Packed rows of Llama 3.2 Vision: tiles, masks of the last images, independent conversations."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.hub.parity import forward
from tests.hub.test_run_files import with_placeholder
from vlm_jax.data import pipeline
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.run import RunProcessor
from vlm_jax.nn.models import build_model
from vlm_jax.structs import PADDING
from vlm_jax.testing import random_params

TALKS = [  # images, question, answer
    ([(40, 20)], "<image>\nwhat is it?", "a cat"),
    ([], "hello", "good day"),
    ([(20, 50), (30, 30)], "<image><image>\ncompare them", "alike"),
    ([(17, 17), (60, 20)], "<image>\nand now\n<image>\nwhich?", "the second"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An experiment on the four conversations, and its tokenizer."""
    folder, rng, records = tmp_path_factory.mktemp("talks"), np.random.default_rng(0), []
    for number, (sizes, question, answer) in enumerate(TALKS):
        names = [f"{number}_{i}.png" for i in range(len(sizes))]
        for name, (width, height) in zip(names, sizes):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": names, "conversations": turns})
    (folder / "t.json").write_text(json.dumps(records))
    cfg = with_placeholder()
    files = {
        "files": (str(folder / "t.json"),),
        "image_dir": str(folder),
        "dir": str(folder / "sets"),
    }
    data = replace(
        cfg.data, source="conversations", images_per_row=5, text_length=120, bos_id=3, **files
    )
    cfg = replace(cfg, data=data, decoder=replace(cfg.decoder, max_positions=256))
    cfg = replace(cfg, train=replace(cfg.train, batch_size=2))
    texts = [text for talk in TALKS for text in talk[1:]]
    return cfg, Tokenizer.train(texts, cfg.decoder.vocab_size), folder


def test_a_packed_conversation_has_the_logits_that_it_has_alone(run):
    """Training rows against `processor(prompts, images, answers=)`, a row for each conversation.

    Compares tokens, tiles, masks and logits.
    """
    cfg, tokenizer, folder = run
    params, model = random_params(cfg, 0.2), build_model(cfg)
    processor, data = RunProcessor(cfg, tokenizer), pipeline.training_iterator(cfg, tokenizer)
    batches = [next(data) for _ in range(32)]
    files = [
        [str(folder / f"{number}_{i}.png") for i in range(len(sizes))]
        for number, (sizes, _, _) in enumerate(TALKS)
    ]
    # One row each in one batch, of one shape.
    alone = processor(
        [question for _, question, _ in TALKS], files, answers=[answer for _, _, answer in TALKS]
    )
    own = np.asarray(forward(model, params, alone).logits)
    for number in range(len(TALKS)):
        is_own = np.asarray(alone.segment_ids)[number] != PADDING
        tokens = np.asarray(alone.tokens)[number, is_own].tolist()
        batch, row, slots = next(
            (batch, row, slots)
            for batch in batches
            for row, slots in segments_of(batch)
            if np.asarray(batch.tokens)[row, slots].tolist() == tokens
            and len(set(batch.segment_ids[row])) > 2
        )
        found = np.asarray(forward(model, params, batch).logits)[row, slots]
        np.testing.assert_allclose(found, own[number, is_own], atol=1e-4)
        weights = np.asarray(batch.loss_weights)[row, slots]
        np.testing.assert_array_equal(weights, np.asarray(alone.loss_weights)[number, is_own])


def segments_of(batch):
    """(row, slots) of every conversation of a batch."""
    for row, segments in enumerate(np.asarray(batch.segment_ids)):
        for segment in sorted(set(segments.tolist()) - {0}):
            yield row, np.flatnonzero(segments == segment)


def test_a_token_reads_the_last_images_before_it(run):
    """Two placeholders side by side are read together; behind another text, the second alone."""
    cfg, tokenizer, folder = run
    processor = RunProcessor(cfg, tokenizer)
    for number, first in ((2, 0), (3, 1)):
        files = [str(folder / f"{number}_{i}.png") for i in range(2)]
        batch = processor([TALKS[number][1]], [files])
        last = np.asarray(batch.image_mask)[0, -1].reshape(2, cfg.vision.tiles)
        assert last.any(1).tolist() == [first == 0, True]
