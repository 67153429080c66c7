"""Likelihoods of answers in a batch equal a direct forward pass, one by one."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import vlm_jax
from tests.hub import tiny_checkpoints
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.generate import NonFiniteLogits
from vlm_jax.infer.likelihood import score_answers
from vlm_jax.infer.run import RunProcessor
from vlm_jax.nn.vlm import VLM
from vlm_jax.testing import random_params, tiny

PROMPTS = ["what is it?", "is there a cat, and where does it sit?", "what is it?"]
ANSWERS = ["cat", "it is a cat", "is there"]
PADDED = 64  # slots of every batch of a test, so that it compiles twice


def tiny_run(kind, template="vicuna"):
    cfg = tiny(kind)
    data = replace(cfg.data, source="conversations", files=("t.json",), template=template)
    decoder = replace(cfg.decoder, tie_word_embeddings=False, max_positions=128)
    cfg = replace(cfg, data=data, decoder=decoder)
    tokenizer = Tokenizer.train([*PROMPTS, *ANSWERS] * 4, 300)
    return VLM(cfg.model), random_params(cfg, 0.3), RunProcessor(cfg, tokenizer)


def tiny_checkpoint(name, folder):
    torch.manual_seed(0)
    return vlm_jax.from_pretrained(tiny_checkpoints.ABOUT_IMAGES[name](folder).path)


@pytest.fixture(scope="module", params=["unified", "cross_attention", "llava", "mllama"])
def loaded(request, tmp_path_factory):
    if request.param in tiny_checkpoints.ABOUT_IMAGES:
        return tiny_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint"))
    return tiny_run(request.param)


@functools.partial(jax.jit, static_argnames="cfg")
def log_softmax(cfg, params, batch):
    logits = VLM(cfg).apply({"params": params}, batch).logits
    return jax.nn.log_softmax(logits.astype(np.float32))


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)) for _ in range(count)]


def test_a_batch_is_scored_as_one_by_one(loaded):
    model, params, processor = loaded
    images = [[image] for image in pictures(len(PROMPTS))]
    scores = score_answers(model, params, processor, PROMPTS, images, ANSWERS, PADDED)
    for prompt, row, answer, score in zip(PROMPTS, images, ANSWERS, scores, strict=True):
        asked = processor([prompt], [row], chat=True)
        batch = processor([prompt], [row], chat=True, answers=[answer], pad_to_multiple_of=PADDED)
        log_probs = log_softmax(model.cfg, params, batch)[0]
        # The answer and the token that ends it follow the prompt.
        length = int(np.sum(batch.segment_ids > 0) - np.sum(asked.segment_ids > 0))
        slots = range(PADDED - length, PADDED - 1)
        tokens = [int(batch.tokens[0, slot]) for slot in slots]
        assert processor.tokenizer.decode(tokens).strip() == answer.strip()
        expected = [float(log_probs[slot - 1, token]) for slot, token in zip(slots, tokens)]
        np.testing.assert_allclose(score.log_likelihood, sum(expected), atol=1e-4)


def test_an_answer_is_greedy_if_generation_begins_with_its_tokens():
    model, params, processor = tiny_run("unified", "plain")
    tokenizer, (image,) = processor.tokenizer, pictures(1)
    prompts = [f"what is {letter}" for letter in "abcdefghijklmnopqrst"]
    batch = processor(prompts, [[image]] * len(prompts), pad_to_multiple_of=PADDED)
    greedy = np.argmax(log_softmax(model.cfg, params, batch)[:, -1], axis=-1)  # (B,)
    texts = [tokenizer.decode([token]) for token in greedy]
    scores = score_answers(
        model, params, processor, prompts, [[image]] * len(prompts), texts, PADDED
    )
    # A part of a character, as text, has other tokens. A special token has no text.
    is_greedy = [tokenizer.encode(text) in ([token], []) for text, token in zip(texts, greedy)]
    assert [score.is_greedy for score in scores] == is_greedy
    assert set(is_greedy) == {True, False}


def test_a_failure_names_the_prompt():
    model, params, processor = tiny_run("unified")
    params = jax.tree.map(lambda x: x * np.nan, params)
    images = [[image] for image in pictures(len(PROMPTS))]
    with pytest.raises(NonFiniteLogits, match="token 1 of 'what is it"):
        score_answers(model, params, processor, PROMPTS, images, ANSWERS, PADDED)
