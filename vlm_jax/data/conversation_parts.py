"""Parts of a conversation: its texts in the form of a template, tokenized, and its images."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlm_jax.config import Experiment
from vlm_jax.data.fields import Fields, image_fields, text_fields
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.data.tokenizer import Tokenizer


class Part(NamedTuple):
    """Consecutive tokens of a conversation: text, or the tokens of one image."""

    fields: Fields
    is_scored: Sequence[bool]
    is_image: bool = False


@dataclass(frozen=True)
class Template:
    """A form of conversation: the text around questions and answers."""

    before_question: str = ""
    after_question: str = ""
    before_answer: str = ""
    keeps_question: bool = True
    after_system: str | None = None  # between a system turn and the first question; None: has none

    def format_question(self, question: str) -> str:
        """Returns the question as it is written, or only its placeholders."""
        if not self.keeps_question:
            question = IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER)
        return f"{self.before_question}{question}{self.after_question}"


class Exchange(NamedTuple):
    """A question as it is written, alone and followed by its answer if it has one."""

    question: str
    text: str
    has_answer: bool


TEMPLATES = {
    "plain": Template(after_question="\n"),
    "vicuna": Template(
        before_question="USER: ", after_question=" ASSISTANT:", before_answer=" ", after_system=" "
    ),
    "caption": Template(keeps_question=False),
}


def exchanges(
    template: Template, turns: Sequence[str], system: str | None = None
) -> list[Exchange]:
    """Writes turns in the form of a template, the system turn before the first question."""
    written = []
    for question, answer in zip(turns[::2], [*turns[1::2], None]):
        question = template.format_question(question)
        if system is not None and not written:
            question = f"{system}{template.after_system}{question}"
        if answer is None:
            written.append(Exchange(question, question, False))
        else:
            text = f"{question}{template.before_answer}{answer}"
            written.append(Exchange(question, text, True))
    return written


def template_parts(
    cfg: Experiment,
    tokenizer: Tokenizer,
    turns: Sequence[str],
    images: Iterator[Fields],
    system: str | None = None,
) -> list[Part]:
    """Returns the parts of a conversation in the form of `data.template`."""
    parts: list[Part] = []
    template = TEMPLATES[cfg.data.template]
    for question, text, has_answer in exchanges(template, turns, system):
        if not parts:
            parts += _begin(cfg, tokenizer, question)
        parts += _text_parts(tokenizer, text, len(question), images)
        if has_answer:
            parts.append(Part(text_fields([tokenizer.eos_id]), [True]))
    return parts


def _begin(cfg: Experiment, tokenizer: Tokenizer, question: str) -> list[Part]:
    """Returns the token before a conversation with this first question, if it needs one."""
    begin = cfg.data.bos_id
    if begin is None:
        images = itertools.repeat(image_fields(cfg))
        parts = _text_parts(tokenizer, question, len(question), images)
        if any(len(part.fields["tokens"]) for part in parts):
            return []
        begin = tokenizer.begin_id
    return [Part(text_fields([begin]), [False])]


def checkpoint_parts(
    tokenizer: Tokenizer,
    turns: Sequence[str],
    images: Iterator[Fields],
    system: str | None = None,
) -> list[Part]:
    """Returns the tokens of the checkpoint's own processor, with an image at every placeholder."""
    ids, is_scored, is_image = tokenizer.dialogue.encode(turns, system)
    parts, begin = [], 0
    for position in np.flatnonzero(is_image):
        parts.append(Part(text_fields(ids[begin:position]), is_scored[begin:position]))
        # A model that reads no images has no fields for them.
        parts.append(_image_part(next(images, text_fields([]))))
        begin = position + 1
    return [*parts, Part(text_fields(ids[begin:]), is_scored[begin:])]


def _text_parts(
    tokenizer: Tokenizer, text: str, scored_from: int, images: Iterator[Fields]
) -> list[Part]:
    """Returns a text with the next image at every placeholder.

    A token is scored if a part of it lies beyond the character `scored_from`. The whole text is
    tokenized at once, since a tokenizer may put a space before a text.
    """
    ids, ends = tokenizer.encode_with_placeholders(text, IMAGE_PLACEHOLDER)
    is_scored = [end > scored_from for end in ends]
    parts, begin = [], 0
    for position, token in enumerate(ids):
        if token is None:
            parts.append(Part(text_fields(ids[begin:position]), is_scored[begin:position]))
            parts.append(_image_part(next(images)))
            begin = position + 1
    return [*parts, Part(text_fields(ids[begin:]), is_scored[begin:])]


def _image_part(fields: Fields) -> Part:
    return Part(fields, [False] * len(fields["tokens"]), is_image=True)
