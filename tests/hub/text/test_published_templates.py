"""Training conversations have the tokens and scores of `apply_chat_template`."""

import itertools
import types
from dataclasses import replace

import numpy as np
import pytest

from tests.hub.text.published_templates import PUBLISHED, write
from vlm_jax.config import UserError
from vlm_jax.data import templates
from vlm_jax.data.conversations import Conversation
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.dialogue import Dialogue, content_parts
from vlm_jax.testing import tiny

TURNS = ("what is it?", "a red car", "and the sky?", "blue,\nor not", "why?", "it's day")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name -> the dialogue of a checkpoint, and transformers' tokenizer."""
    made = {}
    for name, published in PUBLISHED.items():
        folder = tmp_path_factory.mktemp("checkpoint")
        reader = write(folder, published)
        made[name] = Dialogue.load(folder, published.has_images), reader
    return made


def with_images(turns, images):
    """Turns with images in the first two questions."""
    turns = list(turns)
    for number in range(images):
        question = 2 * (number % min(2, len(turns) // 2))
        turns[question] = f"{IMAGE_PLACEHOLDER}\n{turns[question]}"
    return turns


def messages_of(turns, system, has_images):
    messages = []
    for number, text in enumerate(turns):
        content = content_parts(text) if has_images else text
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    if system is not None:
        content = content_parts(system) if has_images else system
        messages.insert(0, {"role": "system", "content": content})
    return messages


def ids_of(reader, messages, **settings):
    encoded = reader.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
    return encoded["input_ids"]


def common(first, second) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second))
    return sum(1 for _ in pairs)


def cases():
    for name, published in PUBLISHED.items():
        for system in (None, "be short") if published.has_system else (None,):
            for images in range(4) if published.has_images else (0,):
                for turns in (2, 6):
                    yield pytest.param(
                        name, system, images, turns, id=f"{name}-{system}-{images}-{turns}"
                    )


@pytest.mark.parametrize(("name", "system", "images", "count"), [*cases()])
def test_ids_and_scores_equal_those_of_transformers(checkpoints, name, system, images, count):
    dialogue, reader = checkpoints[name]
    turns = with_images(TURNS[:count], images)
    messages = messages_of(turns, system, PUBLISHED[name].has_images)
    tokens = dialogue.encode(turns, system)
    expected = ids_of(reader, messages)
    shared = common(tokens.ids, expected)
    # Only white space at the end may be left out, and only an end of text may be added.
    assert not reader.decode(expected[shared:]).strip()
    assert set(tokens.ids[shared:]) <= set(dialogue.eos_ids)
    assert sum(tokens.is_image) == sum(turn.count(IMAGE_PLACEHOLDER) for turn in turns)

    # What is trained on is what is asked.
    first = len(messages) - len(turns)
    is_scored = np.zeros(len(tokens.ids), bool)
    for number in range(1, len(turns), 2):
        prompt = ids_of(reader, messages[: first + number], add_generation_prompt=True)
        assert dialogue.encode(turns[:number], system).ids == prompt
        assert tokens.ids[: len(prompt)] == prompt
        answered = ids_of(reader, messages[: first + number + 1])
        is_scored[len(prompt) : common(answered, expected)] = True
    if "{% generation %}" in PUBLISHED[name].source:
        encoded = reader.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        is_scored[:shared] = np.array(encoded["assistant_masks"][:shared], bool)
    is_scored[shared:] = True
    np.testing.assert_array_equal(tokens.is_scored, is_scored)


def broken(dialogue, source, tmp_path):
    return replace(dialogue, template=ChatTemplate(source, tmp_path / "chat_template.jinja"))


def refuse(dialogue, turns, system=None):
    """The error of a record whose tokens are counted before training."""
    cfg = tiny()
    cfg = replace(cfg, data=replace(cfg.data, template="checkpoint"))
    talks = [Conversation("7", (), tuple(turns), system=system)]
    tokenizer = types.SimpleNamespace(dialogue=dialogue)
    with pytest.raises(UserError) as error:
        templates.max_token_counts(cfg, tokenizer, talks, lambda number: f"a.json: record {number}")
    return str(error.value)


def test_a_template_without_a_system_turn_names_the_record(checkpoints):
    message = refuse(checkpoints["gemma"][0], TURNS, "be short")
    assert message.startswith("a.json: record 0: ")
    assert "has no system turn" in message


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (  # as reasoning models leave out earlier thoughts
            "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else 'x' }}"
            "<|eot_id|>{% endfor %}",
            "changes an answer once a question follows",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}",
            "changes a question once it is answered, '1what is it?' to '6what is it?'",
        ),
        (
            "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
            "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            "marks no answer",
        ),
    ],
)
def test_a_template_that_cannot_mark_answers_names_the_record(checkpoints, tmp_path, source, fault):
    message = refuse(broken(checkpoints["llama 3"][0], source, tmp_path), TURNS)
    assert message.startswith("a.json: record 0: the chat template ")
    assert f"{fault}, so its answers cannot be marked: set data.template" in message
