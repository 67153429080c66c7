"""Conversations in a checkpoint's prompt format, for training: tokens and which of them are scored.

The tokens of a conversation up to an answer equal the inference prompt (`HubProcessor`):
both are rendered by the same chat template and framed by the same `TextFormat`. Answers are scored,
with whatever the template writes after them; if it writes no end-of-text token, one is added.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.config import CheckpointError
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.hub.load import read_start_id
from vlm_jax.hub.tensors.folder import read_json
from vlm_jax.hub.text.chat_template import ChatTemplate
from vlm_jax.hub.text.prompt_formats import EncoderDecoderFormat, TextFormat, load_prompt_format
from vlm_jax.hub.text.tokenizer import HubTokenizer, are_ids
from vlm_jax.hub.text.tokenizer_files import CONFIG

NO_SYSTEM_TURN = (
    "the prompt form of the checkpoint has no system turn, but a conversation has: set "
    "data.template to vicuna, or remove the system turns."
)
NO_TOKEN = -1  # id of an image without a token in the text


class Tokens(NamedTuple):
    """Tokens of a conversation; each list has one entry per token."""

    ids: list[int]  # NO_TOKEN for an image without a placeholder
    is_scored: list[bool]
    is_image: list[bool]  # placeholder of the conversation's next image


@dataclass(frozen=True)
class Dialogue:
    """Renders and tokenizes conversations as the checkpoint's own processor does its prompts."""

    tokenizer: HubTokenizer
    template: ChatTemplate | None
    prompt_format: TextFormat
    prefix_ids: tuple[int, ...]  # before the text
    eos_id: int  # ends an answer
    eos_ids: tuple[int, ...]  # every token that ends an answer

    @classmethod
    def load(cls, folder: str | os.PathLike, has_images: bool) -> "Dialogue":
        """Reads tokenizer, chat template and prompt format from the files of a checkpoint.

        Args:
          has_images: the model takes images. The tokenizer of a processor adds bos to a template's
            text; a tokenizer alone leaves that to the template (transformers 5.23).

        Raises:
          CheckpointError: a file is missing or damaged, or no file names an end-of-text token.
        """
        tokenizer, template = HubTokenizer.load(folder), ChatTemplate.load(folder)
        eos_ids = tuple(i for i in tokenizer.eos_ids if tokenizer.id_to_token(i))
        if not eos_ids:
            raise CheckpointError(
                f"{folder} names no end-of-text token: set eos_token in tokenizer_config.json."
            )
        text_format = load_prompt_format(folder, tokenizer)
        # The other two ids are found by rendering a conversation without them.
        dialogue = cls(tokenizer, template, text_format, (), eos_ids[0], eos_ids)
        if isinstance(text_format, EncoderDecoderFormat):
            prefix_ids = decoder_start_ids(folder, tokenizer)
        else:
            prefix_ids = dialogue._bos_ids(has_images)
        return replace(dialogue, prefix_ids=prefix_ids, eos_id=dialogue._closing_id())

    def encode(self, messages: Sequence[str], system: str | None = None) -> Tokens:
        """Tokenizes alternating messages of a user and an assistant.

        Args:
          messages: the last may be a question to be answered.
          system: text of a system turn before them.

        Raises:
          CheckpointError: the chat template fails, does not write one token per image or the system
            turn, or its text up to an answer is not the beginning of the whole text.
        """
        text, spans = self.script(messages, system)
        ids, ends = self.tokenizer.encode_with_ends(text)
        is_scored = [_is_inside(end, spans) for end in ends]
        num_images = sum(message.count(IMAGE_PLACEHOLDER) for message in messages)
        if self.prompt_format.image_token:
            leading_images = 0
            image_id = self.tokenizer.token_to_id(self.prompt_format.image_token)
            is_image = [i == image_id for i in ids]
            if sum(is_image) != num_images:
                raise CheckpointError(
                    f"the chat template writes {sum(is_image)} image tokens "
                    f"({self.prompt_format.image_token}) for the {num_images} images of a "
                    "conversation: set data.template to plain or vicuna."
                )
        else:
            leading_images = num_images
            is_image = [False] * len(ids)
        if _is_answered(messages) and not self._is_closed(text[spans[-1][0] :]):
            ids, is_scored, is_image = [*ids, self.eos_id], [*is_scored, True], [*is_image, False]
        # Images without a token come first, then the tokens before the text.
        prefix = len(self.prefix_ids)
        return Tokens(
            [NO_TOKEN] * leading_images + [*self.prefix_ids, *ids],
            [False] * (leading_images + prefix) + is_scored,
            [True] * leading_images + [False] * prefix + is_image,
        )

    def script(
        self, messages: Sequence[str], system: str | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of a conversation and the (start, end) characters of its answers."""
        if self.template is None:
            if system is not None:
                raise CheckpointError(NO_SYSTEM_TURN)
            return self._plain_script(messages)
        chat, spans = self._chat(messages, system), []
        whole = self._render(chat)
        # White space after the last answer is neither part of it nor generated.
        if _is_answered(messages) and not self._is_closed(whole):
            whole = whole.rstrip()
        for number in range(len(chat) - len(messages) + 1, len(chat), 2):
            prompt = self._render(chat[:number])
            answered = self._render(chat[: number + 1])
            if not whole.startswith(prompt):
                raise CheckpointError(
                    "the chat template changes a question once it is answered, so its answers "
                    "cannot be marked: set data.template to plain or vicuna."
                )
            end = len(answered) if whole.startswith(answered) else len(whole)
            spans.append((len(prompt), end))
        return whole, spans

    def prompt_text(self, messages: Sequence[str], system: str | None = None) -> str:
        """Returns the text to continue with an answer, before `prompt_format` frames it.

        Raises:
          CheckpointError: as `encode`; or without a chat template, there are several messages.
        """
        if self.template is not None:
            return self._render_template(self._chat(messages, system))
        if system is not None:
            raise CheckpointError(NO_SYSTEM_TURN)
        if len(messages) > 1:
            raise CheckpointError(
                f"a prompt has {len(messages)} turns, but the checkpoint has no chat template: ask "
                "a single question."
            )
        return self._with_image_tokens(messages[0])

    def _plain_script(self, messages: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """Conversation without a chat template.

        The first question is in the family's format; later ones follow an end-of-text token.
        """
        text, spans = "", []
        for number, message in enumerate(messages):
            if number % 2:
                spans.append((len(text), len(text) + len(message)))
                text += message
            elif number:
                eos = self.tokenizer.id_to_token(self.eos_id)
                text += eos + self.prompt_format.follow_up(self._with_image_tokens(message))
            else:
                has_images = IMAGE_PLACEHOLDER in message
                text += self.prompt_format.frame(self._with_image_tokens(message), has_images)
        return text, spans

    def _render(self, chat: list[dict[str, Any]]) -> str:
        return self.prompt_format.frame(self._render_template(chat))

    def _render_template(self, chat: list[dict[str, Any]]) -> str:
        """Text of the template alone, ready for an answer if the last message is a question."""
        is_question = chat[-1]["role"] == "user"
        return self.template.render(
            chat, self.tokenizer.special_tokens, add_generation_prompt=is_question
        )

    def _chat(self, messages: Sequence[str], system: str | None) -> list[dict[str, Any]]:
        first = [] if system is None else [self._system_message(system)]
        return [*first, *(self._message(number, text) for number, text in enumerate(messages))]

    def _message(self, number: int, text: str) -> dict[str, Any]:
        role = "assistant" if number % 2 else "user"
        if self._accepts_lists:
            parts = content_parts(text) if role == "user" else [{"type": "text", "text": text}]
            return {"role": role, "content": parts}
        token = self.prompt_format.image_token
        if token:
            return {"role": role, "content": text.replace(IMAGE_PLACEHOLDER, token)}
        return {"role": role, "content": self._with_image_tokens(text)}

    def _system_message(self, text: str) -> dict[str, Any]:
        if not self._takes_system_text:
            return {"role": "system", "content": [{"type": "text", "text": text}]}
        return {"role": "system", "content": text}

    @functools.cached_property
    def _takes_system_text(self) -> bool:
        """True if the content of a system turn must be a text, not a list of parts.

        Raises:
          CheckpointError: the template does not write a system turn.
        """
        probe = "answer in one word"
        for content in ([{"type": "text", "text": probe}], probe):
            chat = [{"role": "system", "content": content}, self._message(0, "question")]
            try:
                text = self._render_template(chat)
            except CheckpointError:
                continue
            # A template for text only may print the Python list, where the text is in quotes.
            if probe in text and repr(probe) not in text:
                return content == probe
        raise CheckpointError(NO_SYSTEM_TURN)

    def _with_image_tokens(self, question: str) -> str:
        """Replaces the placeholders of a question by the family's image token."""
        parts = content_parts(question)
        return "".join(part.get("text", self.prompt_format.image_token) for part in parts)

    def _is_closed(self, text: str) -> bool:
        """True if a text ends with an end-of-text token, up to white space."""
        return text.rstrip().endswith(tuple(map(self.tokenizer.id_to_token, self.eos_ids)))

    @functools.cached_property
    def _accepts_lists(self) -> bool:
        return self.template.accepts_lists(self.tokenizer.special_tokens)

    def _bos_ids(self, has_images: bool) -> tuple[int, ...]:
        """bos, if the tokenizer adds it to a prompt; without a template, always if it has one.

        With a template, transformers lets the tokenizer add bos only in a processor for images, and
        only if the template has not written it.
        """
        bos = self.tokenizer.special_tokens.get("bos_token", "")
        adds_bos = self.tokenizer.encode("a")[:1] == [self.tokenizer.bos_id]
        if not (adds_bos and self.prompt_format.takes_bos):
            return ()
        if self.template is not None:
            writes_bos = self._render_template([self._message(0, "question")]).startswith(bos)
            if not has_images or (bos and writes_bos):
                return ()
        return (self.tokenizer.bos_id,)

    def _closing_id(self) -> int:
        """The token that ends an answer in the chat template, else the first of `eos_ids`."""
        if self.template is not None:
            chat = [self._message(0, "question"), self._message(1, "answer")]
            text = self._render(chat).rstrip()
            for i in self.eos_ids:
                if text.endswith(self.tokenizer.id_to_token(i)):
                    return i
        return self.eos_ids[0]


def _is_answered(messages: Sequence[str]) -> bool:
    return len(messages) % 2 == 0


def _is_inside(end: int, spans: list[tuple[int, int]]) -> bool:
    """True if a token that ends at this character belongs to one of the (start, end) spans."""
    return any(start < end <= span_end for start, span_end in spans)


def decoder_start_ids(folder: str | os.PathLike, tokenizer: HubTokenizer) -> tuple[int, ...]:
    """The token that starts the decoder of an encoder-decoder, as a tuple of one id.

    Raises:
      CheckpointError: decoder_start_token_id is not an id.
    """
    folder = Path(folder).expanduser()
    start = read_start_id(folder, read_json(folder / CONFIG))
    start = tokenizer.bos_id if start is None else start
    if not are_ids(start):
        raise CheckpointError(f"{folder}: decoder_start_token_id is {start!r}, but must be an id.")
    return (start,)


def content_parts(message: str) -> list[dict[str, str]]:
    """Splits a message at its image placeholders into the parts of a chat template's content.

    Images and texts keep their order; one line end after each placeholder is dropped.
    """
    parts = []
    for number, piece in enumerate(message.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
