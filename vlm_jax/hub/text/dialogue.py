"""A checkpoint's prompt form for training: conversations -> tokens, and which of them are answers.

The tokens of a conversation up to an answer are those of the inference prompt (`Processor.asked`), because both are
rendered by the same chat template and framed by the same `TextFormat`. Scored are the answers, with whatever the
template puts behind them, and one token that ends the text where the template writes none.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.config import CheckpointError
from vlm_jax.data.conversation_files import IMAGE_PLACEHOLDER
from vlm_jax.hub.load import start_id_of
from vlm_jax.hub.tensors.folder import read_json
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.prompt_formats import EncoderDecoderFormat, TextFormat, load_prompt_format
from vlm_jax.hub.text.tokenizer import HubTokenizer, are_ids
from vlm_jax.hub.text.tokenizer_files import CONFIG

NO_TOKEN = -1  # id of an image that has no token in the text


class Tokens(NamedTuple):
    """Tokens of a conversation; each list has one entry a token."""

    ids: list[int]  # NO_TOKEN for an image without a placeholder
    is_scored: list[bool]
    is_image: list[bool]  # the placeholder of an image, the next of the conversation


@dataclass(frozen=True)
class Dialogue:
    """Renders and tokenizes conversations as a checkpoint's own processor does its prompts."""

    tokenizer: HubTokenizer
    template: ChatTemplate | None
    form: TextFormat
    begin: tuple[int, ...]  # tokens before the text
    eos_id: int  # ends an answer
    ends: tuple[int, ...]  # all tokens that do

    @classmethod
    def load(cls, folder: str | os.PathLike, has_images: bool) -> "Dialogue":
        """Reads tokenizer, chat template and prompt form from the files of a checkpoint.

        Args:
          has_images: whether the model reads images; a processor's tokenizer adds bos to a template's text, a
            tokenizer alone leaves it to the template (transformers 5.23).

        Raises:
          CheckpointError: a file is missing or damaged, or none names a token that ends a text.
        """
        tokenizer, template = HubTokenizer.load(folder), ChatTemplate.load(folder)
        ends = tuple(i for i in tokenizer.eos_ids if tokenizer.id_to_token(i))
        if not ends:
            raise CheckpointError(
                f"{folder} names no token that ends a text: set eos_token in tokenizer_config.json."
            )
        form = load_prompt_format(folder, tokenizer)
        found = cls(tokenizer, template, form, (), ends[0], ends)
        begin = (
            start_of(folder, tokenizer)
            if isinstance(form, EncoderDecoderFormat)
            else found._bos(has_images)
        )
        return replace(found, begin=begin, eos_id=found._closing_id())

    def encode(self, turns: Sequence[str]) -> Tokens:
        """Turns of a human and an assistant -> tokens; the last turn may be a question to be answered.

        Raises:
          CheckpointError: the chat template fails, does not write one token for each image, or its text up to an answer is
            not the beginning of the whole text.
        """
        text, spans = self.script(turns)
        ids, ends = self.tokenizer.encode_with_ends(text)
        marks = sum(turn.count(IMAGE_PLACEHOLDER) for turn in turns)
        images = [] if self.form.image_token else [True] * marks
        begin = list(self.begin)
        image_id = self.tokenizer.id_of(self.form.image_token) if self.form.image_token else None
        scored = [any(first < end <= last for first, last in spans) for end in ends]
        is_image = [i == image_id for i in ids]
        if image_id is not None and sum(is_image) != marks:
            raise CheckpointError(
                f"the chat template writes {sum(is_image)} image tokens ({self.form.image_token}) for the {marks} "
                "images of a conversation: set data.template to plain or vicuna."
            )
        if len(turns) % 2 == 0 and not self._closes(text[spans[-1][0] :]):
            ids, scored, is_image = [*ids, self.eos_id], [*scored, True], [*is_image, False]
        before = len(images) + len(begin)
        return Tokens(
            [NO_TOKEN] * len(images) + begin + ids,
            [False] * before + scored,
            images + [False] * len(begin) + is_image,
        )

    def script(self, turns: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the (first, last) characters of its answers."""
        if self.template is None:
            return self._plain_script(turns)
        messages = [self._message(number, turn) for number, turn in enumerate(turns)]
        whole, spans = self._render(messages), []
        if len(turns) % 2 == 0 and not self._closes(whole):
            whole = whole.rstrip()
        for answered in range(1, len(turns), 2):
            prompt, through = (
                self._render(messages[:answered]),
                self._render(messages[: answered + 1]),
            )
            if not whole.startswith(prompt):
                raise CheckpointError(
                    "the chat template writes an answered question otherwise than a question to be answered, so that "
                    "its answers cannot be marked: set data.template to plain or vicuna."
                )
            end = len(through) if whole.startswith(through) else len(whole)
            spans.append((len(prompt), end))
        return whole, spans

    def _plain_script(self, turns: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """Without a chat template: the first question in the family's form, those after it behind an end of text."""
        text, spans, end = "", [], self.tokenizer.id_to_token(self.eos_id)
        for number in range(0, len(turns), 2):
            question = self._joined(turns[number])
            text += (
                end + self.form.following(question) if number else self._framed(question, turns[0])
            )
            if number + 1 < len(turns):
                spans.append((len(text), len(text) + len(turns[number + 1])))
                text += turns[number + 1]
        return text, spans

    def _framed(self, question: str, turn: str) -> str:
        return self.form.frame(question, IMAGE_PLACEHOLDER in turn)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self.form.frame(self._rendered(messages))

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        """The text of the template alone."""
        asks = messages[-1]["role"] == "user"
        return self.template.render(
            messages, self.tokenizer.special_tokens, add_generation_prompt=asks
        )

    def _message(self, number: int, turn: str) -> dict[str, Any]:
        role = "assistant" if number % 2 else "user"
        if not self._reads_lists:
            token = self.form.image_token
            return {
                "role": role,
                "content": turn.replace(IMAGE_PLACEHOLDER, token) if token else self._joined(turn),
            }
        parts = content_parts(turn) if role == "user" else [{"type": "text", "text": turn}]
        return {"role": role, "content": parts}

    def _joined(self, question: str) -> str:
        """A question as one text, with the family's image token for every image."""
        parts = content_parts(question)
        return "".join(part.get("text", self.form.image_token) for part in parts)

    def _closes(self, text: str) -> bool:
        """Whether a text ends with a token that ends an answer, up to white space."""
        names = tuple(map(self.tokenizer.id_to_token, self.ends))
        return text.rstrip().endswith(names)

    @functools.cached_property
    def _reads_lists(self) -> bool:
        return self.template.reads_lists(self.tokenizer.special_tokens)

    def _bos(self, has_images: bool) -> tuple[int, ...]:
        """bos, where the tokenizer adds it to a prompt: transformers leaves it to a template without images."""
        bos = self.tokenizer.special_tokens.get("bos_token", "")
        begins = self.tokenizer.encode("a")[:1] == [self.tokenizer.bos_id]
        if self.template is None:
            return (self.tokenizer.bos_id,) if begins and self.form.takes_bos else ()
        writes_bos = bool(bos) and self._rendered([self._message(0, "question")]).startswith(bos)
        adds = begins and self.form.takes_bos and has_images and not writes_bos
        return (self.tokenizer.bos_id,) if adds else ()

    def _closing_id(self) -> int:
        """The token that ends an answer in the chat template, or else the first that the checkpoint names."""
        if self.template is not None:
            text = self._render([self._message(0, "question"), self._message(1, "answer")]).rstrip()
            for i in self.ends:
                if text.endswith(self.tokenizer.id_to_token(i)):
                    return i
        return self.ends[0]


def start_of(folder: str | os.PathLike, tokenizer: HubTokenizer) -> tuple[int, ...]:
    """The token that starts the decoder of an encoder-decoder."""
    folder = Path(folder).expanduser()
    start = start_id_of(folder, read_json(folder / CONFIG))
    start = tokenizer.bos_id if start is None else start
    if not are_ids(start):
        raise CheckpointError(
            f"{folder}: decoder_start_token_id is {start!r}, but has to be an id."
        )
    return (start,)


def content_parts(turn: str) -> list[dict[str, str]]:
    """A turn with marks -> the parts of a message: images and texts in their order, without the line ends between."""
    parts = []
    for number, piece in enumerate(turn.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
