"""Reads the requests of lmms-eval (0.7.3, `api/task.py`), without importing it.

The arguments of a request depend on the form of the task:

    simple  (context, gen_kwargs, doc_to_visual, doc_id, task, split), and doc_to_text after
            doc_to_visual if there are several rounds
    chat    (context, doc_to_messages, gen_kwargs, doc_id, task, split)

A likelihood has (context, target, doc_to_visual, doc_id, task, split), or (context, target) alone.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm_jax.config import ConfigError
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub.images.steps import ImageInput
from vlm_jax.hub.text.prompts import ChatPrompt
from vlm_jax.infer.answer import AnswerOptions

# Of gen_kwargs; the others are about videos or other models.
OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "until")

# (task, split, id) -> the document.
Documents = Callable[[str, str, int], Any]


class Question(NamedTuple):
    """A prompt and its images."""

    prompt: ChatPrompt
    images: list[ImageInput]


class Round(NamedTuple):
    """The next round of a request."""

    read: Callable[[], Question] | None  # None: no round follows
    outputs: list[str]  # the answers so far, which a task may change
    info: Any  # of the task, for the round after it


@dataclass(frozen=True)
class Query:
    """A request to generate an answer.

    Attributes:
      context: text of the task; prompts with contexts of similar lengths share a batch.
      options: gen_kwargs of the task.
      read: reads the document, whose images may be large.
      next_round: (number of rounds so far, answers, info of the round before) -> the next round.
    """

    context: str
    options: Mapping[str, Any]
    read: Callable[[], Question]
    next_round: Callable[[int, list[str], Any], Round]


def simple_query(arguments: tuple, documents: Documents) -> Query:
    """Reads a request of the simple form."""
    context, options, doc_to_visual, *doc_to_text, doc_id, task, split = arguments
    name = f"document {doc_id} of {task}"

    def read() -> Question:
        return simple_question(context, doc_to_visual(documents(task, split, doc_id)), name)

    def next_round(number: int, outputs: list[str], info: Any) -> Round:
        visuals, text, is_over, changed, info = doc_to_text[0](
            documents(task, split, doc_id),
            previous_output=outputs,
            round_idx=number,
            previous_round_info=info,
        )
        read = None if is_over else functools.partial(simple_question, text, visuals, name)
        return Round(read, outputs if changed is None else list(changed), info)

    return Query(context, options, read, next_round)


def chat_query(arguments: tuple, documents: Documents) -> Query:
    """Reads a request of the chat form."""
    context, doc_to_messages, options, doc_id, task, split = arguments
    name = f"document {doc_id} of {task}"

    def read() -> Question:
        return chat_question(doc_to_messages(documents(task, split, doc_id)), name)

    def next_round(number: int, outputs: list[str], info: Any) -> Round:
        step = doc_to_messages(
            documents(task, split, doc_id),
            round_idx=number,
            previous_output=outputs,
            previous_round_info=info,
        )
        # A task of a single round returns messages alone.
        if not isinstance(step, tuple):
            return Round(None, outputs, info)
        messages, is_over, changed, info = step
        read = None if is_over else functools.partial(chat_question, messages, name)
        return Round(read, outputs if changed is None else list(changed), info)

    return Query(context, options, read, next_round)


def likelihood_query(arguments: tuple, documents: Documents) -> tuple[Question, str]:
    """Reads a request for the likelihood of a text: the question and the text.

    White space around the text is dropped: the prompt's format writes its own.
    """
    context, target, *source = arguments
    if not source:
        return simple_question(context, None, "a request"), target.strip()
    doc_to_visual, doc_id, task, split = source
    document = documents(task, split, doc_id)
    target = target(document) if callable(target) else target
    name = f"document {doc_id} of {task}"
    return simple_question(context, doc_to_visual(document), name), target.strip()


def simple_question(context: str, visuals: Sequence | None, name: str) -> Question:
    """Returns the question of the simple form: images precede a text without placeholders.

    Args:
      name: of the document, in messages.

    Raises:
      ConfigError: a visual is not an image, or the text has another number of placeholders.
    """
    images = [_check_image(visual, name) for visual in visuals or ()]
    placeholders = context.count(IMAGE_PLACEHOLDER)
    if images and not placeholders:
        context = "\n".join([*[IMAGE_PLACEHOLDER] * len(images), context])
    elif placeholders != len(images):
        raise ConfigError(
            f"{name} has {len(images)} images but {placeholders} {IMAGE_PLACEHOLDER} placeholders."
        )
    return Question(ChatPrompt((context,)), images)


def chat_question(messages: Sequence[Mapping], name: str) -> Question:
    """Returns the question of the chat form: messages of a user and an assistant in turn, after at
    most one of the system.

    Raises:
      ConfigError: the roles have another order, or a part is neither text nor an image.
    """
    messages, system = list(messages), None
    images: list[ImageInput] = []
    if messages and messages[0]["role"] == "system":
        system = _join_parts(messages.pop(0)["content"], images, name)
    turns = []
    for number, message in enumerate(messages):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise ConfigError(
                f"{name} has a message of {message['role']} where one of {expected} must follow."
            )
        turns.append(_join_parts(message["content"], images, name))
    if len(turns) % 2 == 0:
        raise ConfigError(f"{name} does not end with a message of user.")
    return Question(ChatPrompt(tuple(turns), system), images)


def _join_parts(content: str | Sequence[Mapping], images: list[ImageInput], name: str) -> str:
    """Returns the text of a message, and appends its images.

    An image is a placeholder on a line of its own, as in `data/forms/layouts.py`.
    """
    if isinstance(content, str):
        return content
    text = ""
    for number, part in enumerate(content, 1):
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "image":
            images.append(_check_image(part["url"], name))
            text += IMAGE_PLACEHOLDER + ("\n" if number < len(content) else "")
        else:
            raise ConfigError(f"{name} has a part of the type {part['type']}: only text and image.")
    return text


def _check_image(visual: Any, name: str) -> ImageInput:
    if isinstance(visual, dict):
        raise ConfigError(f"{name} has a {visual.get('type', 'video')}: only images are supported.")
    return visual


def read_options(
    gen_kwargs: Mapping[str, Any], default_max_new_tokens: int
) -> tuple[AnswerOptions, list[str]]:
    """Returns the options of a task, and the names of those that have no meaning here.

    Without `do_sample`, a temperature above 0 samples, as in lmms-eval's own models.

    Raises:
      ConfigError: an option is out of range, or asks for beam search.
    """
    options = {name: value for name, value in gen_kwargs.items() if value is not None}
    ignored = [name for name in options if name not in OPTIONS]
    if options.get("num_beams", 1) != 1:
        raise ConfigError(
            f"a task sets num_beams {options['num_beams']}, but beam search is not supported: add "
            "--gen_kwargs num_beams=1."
        )
    until = options.get("until", ())
    sampling = {}
    temperature = options.get("temperature", 0.0)
    if options.get("do_sample", temperature > 0):
        sampling = {name: options[name] for name in ("top_p", "top_k") if name in options}
        sampling["temperature"] = options.get("temperature", 1.0)
    answer_options = AnswerOptions(
        max_new_tokens=options.get("max_new_tokens", default_max_new_tokens),
        stop=(until,) if isinstance(until, str) else tuple(until),
        **sampling,
    )
    answer_options.check()
    return answer_options, ignored
