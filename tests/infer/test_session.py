"""A conversation with a kept KV cache gives the answers to the whole conversation read anew."""

from dataclasses import replace

import numpy as np
import pytest

import vlm_jax
from vlm_jax.config import Data
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.text.prompt_formats import ChatPrompt
from vlm_jax.infer.answer import AnswerOptions
from vlm_jax.infer.run import RunProcessor
from vlm_jax.infer.session import Session
from vlm_jax.nn.vlm import VLM
from vlm_jax.testing import random_params, tiny

NEW = 6
QUESTIONS = ("what shape is it?", "and the colour?", "is it red?")
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (20, 24, 3)).astype(np.uint8) for _ in range(3)]
TOKENIZER = Tokenizer.train([*QUESTIONS, "USER: ASSISTANT: yes no"], 290)


def model_of(kind: str, template: str = "vicuna"):
    """A model with random parameters, and the processor of its run."""
    cfg = tiny(kind, data=Data(source="conversations", template=template, augment=()))
    decoder = replace(cfg.decoder, tie_word_embeddings=False, max_positions=400)
    cfg = replace(cfg, decoder=decoder)
    return VLM(cfg.model), random_params(cfg, 0.3), RunProcessor(cfg, TOKENIZER)


def read_anew(model, session: Session, question: str, images=(), **options) -> str:
    """The answer to the next question, by `generate`."""
    turns = (*session.turns, "\n".join([*["<image>"] * len(images), question]))
    prompt = ChatPrompt(turns, session.system)
    shown = [[*session.images, *images]]
    return vlm_jax.generate(*model, [prompt], shown, max_new_tokens=NEW, **options)[0]


@pytest.mark.parametrize("kind", ["unified", "cross_attention", "hybrid"])
def test_turns_and_images_are_answered_as_if_read_anew_and_cost_their_own_tokens(kind):
    model = model_of(kind)
    session = Session(*model, AnswerOptions(max_new_tokens=NEW), system="be brief")
    shown = [IMAGES[:1], IMAGES[1:2], []]
    total = 0
    answers = []
    for question, images in zip(QUESTIONS, shown):
        expected = read_anew(model, session, question, images)
        answer = "".join(session.ask(question, images))
        assert answer == expected
        answers.append(answer)
        prompt = ChatPrompt(tuple(session.turns[:-1]), session.system)
        length = model[2]([prompt], [session.images]).tokens.shape[1]
        # An answer may be tokenized in another way than it was generated.
        assert session.computed_tokens <= length - total + NEW + 1
        assert session.encoded_images == len(images)
        total = length
    assert len(set(answers)) > 1, "the answers are all alike: the test would show little"

    assert session.undo() and session.undo()
    assert session.images == IMAGES[:1] and len(session.turns) == 2
    assert "".join(session.ask(QUESTIONS[1], IMAGES[2:])) == read_anew(
        model, replace_turns(session), QUESTIONS[1], IMAGES[2:]
    )
    session.reset()
    assert not session.undo()
    expected = read_anew(model, session, QUESTIONS[0])
    assert "".join(session.ask(QUESTIONS[0])) == expected


def replace_turns(session: Session) -> Session:
    """The conversation before its last turn."""
    before = replace(session, turns=session.turns[:], images=session.images[:])
    before.undo()
    return before
