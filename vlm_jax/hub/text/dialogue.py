"""Conversations in a checkpoint's prompt format, for training: tokens and which of them are scored.

The tokens of a conversation up to an answer equal the inference prompt (`HubProcessor`):
both are rendered by the same chat template and framed by the same `TextFormat`. The tokens in the
`{% generation %}` blocks of a template are scored. Without blocks it is the answers, with whatever
the template writes after them. If it writes no end-of-text token, one is added.
"""

import functools
import itertools
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
from vlm_jax.hub.text.prompt_formats import (
    EncoderDecoderFormat,
    TextFormat,
    load_prompt_format,
)
from vlm_jax.hub.text.tokenizer import HubTokenizer, are_ids
from vlm_jax.hub.text.tokenizer_files import CONFIG

NO_SYSTEM_TURN = (
    "the prompt form of the checkpoint has no system turn, but a conversation has: set "
    "data.template to vicuna, or remove the system turns."
)
CANNOT_MARK = "so its answers cannot be marked: set data.template to plain or vicuna."
SHOWN_CHARACTERS = 12  # of a text, before and after its first difference from another
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
        text_format = load_prompt_format(folder, tokenizer, has_images)
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
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        is_scored = [_is_inside(text, offset, spans) for offset in offsets]
        num_images = sum(message.count(IMAGE_PLACEHOLDER) for message in messages)
        if self.prompt_format.image_token:
            leading_images = 0
            image_id = self.tokenizer.token_to_id(self.prompt_format.slot_token)
            is_image = [i == image_id for i in ids]
            if sum(is_image) != num_images:
                raise CheckpointError(
                    f"the chat template writes {sum(is_image)} image tokens "
                    f"({self.prompt_format.slot_token}) for the {num_images} images of a "
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
        """Returns the text of a conversation and the (start, end) characters that are scored."""
        if self.template is None:
            if system is not None:
                raise CheckpointError(NO_SYSTEM_TURN)
            return self._plain_script(messages)
        chat, spans = self._chat(messages, system), []
        whole, marked = self._render(chat), self.template.marked_spans
        if marked:
            marked = self._shift(marked, self._render_template(chat), whole)
        # White space after the last answer is neither part of it nor generated.
        if _is_answered(messages) and not self._is_closed(whole):
            whole = whole.rstrip()
        for number in range(len(chat) - len(messages) + 1, len(chat), 2):
            prompt = self._render(chat[:number])
            if not whole.startswith(prompt):
                asked, answered = _show_difference(prompt, whole)
                raise CheckpointError(
                    f"the chat template changes a question once it is answered, {asked!r} to "
                    f"{answered!r}, {CANNOT_MARK[:-1]}, or correct the template."
                )
            end = len(whole)
            if number + 1 < len(chat):
                end = self._answer_end(whole, len(prompt), chat[: number + 1], messages)
            spans.append((len(prompt), end))
        if not (spans and self.template.marks_answers):
            return whole, spans
        if not marked:
            raise CheckpointError(f"the chat template marks no answer, {CANNOT_MARK}")
        return whole, [(start, min(end, len(whole))) for start, end in marked]

    def _answer_end(self, whole: str, start: int, chat: list, messages: Sequence[str]) -> int:
        """Returns the end of the last answer of `chat` in the text of the whole conversation.

        A template may end every text with a token, such as Phi-3's <|endoftext|>. So the answer
        ends where the tokens of the two texts begin to differ. If these do not hold the answer, as
        with Qwen3's template, which writes an empty block of reasoning in the last answer only, the
        answer ends at its end-of-text token.
        """
        answered = self._render(chat)
        if whole.startswith(answered):
            return len(answered)
        ids, offsets = self.tokenizer.encode_with_offsets(whole)
        answered_ids, _ = self.tokenizer.encode_with_offsets(answered)
        pairs = zip(ids, answered_ids)
        count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        end = offsets[count - 1][1] if count else 0
        has_system = chat[0]["role"] == "system"
        answer = messages[len(chat) - 1 - has_system].strip()
        if answer not in whole[start:end]:
            eos = self.tokenizer.id_to_token(self.eos_id)
            end = whole.find(eos, start) + len(eos)
        if answer not in whole[start:end]:
            raise CheckpointError(
                f"the chat template changes an answer once a question follows, {CANNOT_MARK}"
            )
        return end

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
                text += eos + self.prompt_format.follow_up(self._with_image_texts(message))
            else:
                has_images = IMAGE_PLACEHOLDER in message
                text += self.prompt_format.frame(self._with_image_texts(message), has_images)
        return text, spans

    def _render(self, chat: list[dict[str, Any]]) -> str:
        return self.prompt_format.frame(self.prompt_format.expand(self._render_template(chat)))

    def _shift(
        self, spans: list[tuple[int, int]], rendered: str, framed: str
    ) -> list[tuple[int, int]]:
        """Moves spans of a template's text to their characters in the framed text."""
        expand = self.prompt_format.expand
        moved = []
        for start, end in spans:
            moved.append((len(expand(rendered[:start])), len(expand(rendered[:end]))))
        first = moved[0][0]
        shift = framed.rindex(expand(rendered)[first:]) - first
        return [(start + shift, end + shift) for start, end in moved]

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

    @property
    def takes_system_turn(self) -> bool:
        """True if the form of the prompts has a system turn."""
        if self.template is None:
            return False
        try:
            self._takes_system_text  # noqa: B018 (raises without one)
        except CheckpointError:
            return False
        return True

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

    def _with_image_texts(self, question: str) -> str:
        """Replaces the placeholders of a question by the family's text of an image."""
        return self.prompt_format.expand(self._with_image_tokens(question))

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


def _show_difference(first: str, second: str) -> tuple[str, str]:
    """Returns the characters of two texts around their first difference."""
    start = len(os.path.commonprefix([first, second]))
    shown = slice(max(0, start - SHOWN_CHARACTERS), start + SHOWN_CHARACTERS)
    return first[shown], second[shown]


def _is_answered(messages: Sequence[str]) -> bool:
    return len(messages) % 2 == 0


def _is_inside(text: str, offset: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    """True if a token at (start, end) characters belongs to one of the (start, end) spans.

    Of the text after a span the token may hold only white space.
    """
    token_start, token_end = offset
    for start, end in spans:
        if start < token_end and token_start < end:
            return not text[end:token_end].strip()
    return False


def decoder_start_ids(folder: str | os.PathLike, tokenizer: HubTokenizer) -> tuple[int, ...]:
    """The token that starts the decoder of an encoder-decoder, as a tuple of one id.

    Raises:
      CheckpointError: decoder_start_token_id is not an id.
    """
    folder = Path(os.path.expanduser(folder))
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
