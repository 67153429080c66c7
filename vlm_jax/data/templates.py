"""The form of a conversation: turns -> tokens, what of them is scored, and where images stand.

    plain      question \\n answer <eos> question \\n answer <eos>
    vicuna     USER: question ASSISTANT: answer <eos> USER: question ASSISTANT: answer <eos>
    caption    answer <eos>
    checkpoint what the chat template or the prompt form of the checkpoint makes of it (hub/text/dialogue.py)

vicuna is that of LLaVA 1.5 (Liu et al. 2023, as its published tokenizer folder spells it). caption drops what the human
says but for the images, as LLaVA's first stage does. Scored are the answers and the <eos> after each. An image stands
where its mark is, and is seen from there on: in the sequence as its tokens, otherwise as nothing but what may be read.

A conversation begins with `data.bos_id`. Without one, a begin token (`Tokenizer.begin_id`) precedes a first question
that has no token of its own, so that the first token of every answer has a token that predicts it: a caption of an
image that is not in the sequence, or of no image, is `<eos> answer <eos>`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data.conversation_files import IMAGE_PLACEHOLDER
from vlm_jax.data.text import (
    Fields,
    image_fields,
    joined,
    only_own_tile,
    padded,
    text_fields,
)
from vlm_jax.data.tiling import views_there
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import NO_IMAGE, TRUNK

Part = tuple[
    Fields, Sequence[bool], int
]  # fields, which of them are scored, and how many images they are


@dataclass(frozen=True)
class Template:
    before: str = ""  # a question
    after: str = ""  # a question
    gap: str = ""  # before an answer
    keeps_question: bool = True

    def asked(self, question: str) -> str:
        return (
            self.before
            + (
                question
                if self.keeps_question
                else IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER)
            )
            + self.after
        )


TEMPLATES = {
    "plain": Template(after="\n"),
    "vicuna": Template(before="USER: ", after=" ASSISTANT:", gap=" "),
    "caption": Template(keeps_question=False),
}


def encode(
    cfg: Experiment, tokenizer: Tokenizer, turns: Sequence[str], tiles: Sequence[int]
) -> Fields:
    """Turns -> the fields of their tokens, (N,) each; the last turn may be a question that is to be answered.

    `tiles` has the number of tiles of every marked image. `image_token_index` and `image_tags` count the image tokens and the
    views of this conversation alone; `images_seen` is the number of images that a token may read: those up to it and,
    of a token that predicts an answer, all before the predicted token. With `fusion.placeholder`, it reads the last of
    them only, and those whose placeholders stand right before it, from number `images_from` on (Alayrac et al. 2022,
    Flamingo, section 2.3; transformers' `get_cross_attention_token_mask` of mllama).
    """
    images = (image_fields(cfg, count, number) for number, count in enumerate(tiles))
    if cfg.data.template == "checkpoint":
        parts = _checkpoint_parts(cfg, tokenizer, turns, images)
    else:
        parts = _template_parts(cfg, tokenizer, turns, images)
    scored = np.concatenate([np.asarray(those, bool) for _, those, _ in parts])
    lengths, shown = [len(those) for _, those, _ in parts], [number for _, _, number in parts]
    fields = joined([fields for fields, _, _ in parts])
    predicts_answer = np.append(
        scored[1:], True
    )  # the last token, of an answer that is still to come
    seen = np.repeat(np.cumsum(shown), lengths)
    seen_next = np.append(seen[1:], sum(shown))
    fields |= {
        # An image that is not in the sequence may stand between these two tokens.
        "images_seen": np.where(predicts_answer, seen_next, seen).astype(np.int32),
        "image_tags": np.where(predicts_answer, np.int32(NO_IMAGE), fields["image_tags"]),
        "targets": np.append(fields["tokens"][1:], np.int32(cfg.data.special_ids[0])),
        "loss_weights": np.append(scored[1:], False).astype(np.float32),
    }
    if cfg.fusion.placeholder:
        fields["images_from"] = _first_read(shown, lengths, fields["images_seen"])
    if cfg.fusion.prefix == "bidirectional":  # all that stands before the first answer
        fields["block_ids"] = (np.cumsum(scored) == 0).astype(np.int32)
    return fields


def _first_read(shown: Sequence[int], lengths: Sequence[int], seen: np.ndarray) -> np.ndarray:
    """The number of the first image that each token reads, given how many images it has seen."""
    starts: list[int] = []
    is_adjacent = False
    for is_image, length in zip(shown, lengths, strict=True):
        if is_image:
            starts.append(starts[-1] if is_adjacent else len(starts))
            is_adjacent = True
        elif length:
            is_adjacent = False
    return np.array([0, *starts], np.int32)[seen]


def cut(cfg: Experiment, fields: Fields, tiles: Sequence[int], length: int) -> Fields:
    """Cuts the fields of `encode` to at most `length` tokens; an image that does not fit is cut away as a whole."""
    seen = fields["images_seen"]
    if len(seen) <= length:
        return fields
    number = int(
        seen[length]
    )  # of the image that the first token beyond the cut belongs to, or comes after
    start = int(np.searchsorted(seen, number))
    is_within_image = number > 0 and length < start + len(
        image_fields(cfg, tiles[number - 1])["tokens"]
    )
    end = start if is_within_image else length
    return {name: values[:end] for name, values in fields.items()}


def most_tokens(
    cfg: Experiment, tokenizer: Tokenizer, conversations: Sequence[Sequence[str]]
) -> list[int]:
    """Returns an upper bound on the tokens of each conversation, as if it needed a begin token and all images had the
    most tiles. The texts are tokenized together, on all cores."""
    more_per_mark = cfg.image_slots_in_row - 1  # a mark is counted as one token
    if cfg.data.template == "checkpoint":
        encoded = [tokenizer.dialogue.encode(turns) for turns in conversations]
        return [len(ids) + int(np.sum(is_image)) * more_per_mark for ids, _, is_image in encoded]
    template = TEMPLATES[cfg.data.template]
    exchanges = [_exchanges(template, turns) for turns in conversations]
    counts = iter(
        tokenizer.count_tokens(
            [text for talk in exchanges for _, text, _ in talk], IMAGE_PLACEHOLDER
        )
    )
    lengths = []
    for talk in exchanges:
        slots = sum(text.count(IMAGE_PLACEHOLDER) for _, text, _ in talk) * more_per_mark
        ends = sum(is_answered for _, _, is_answered in talk)
        lengths.append(1 + slots + ends + sum(next(counts) for _ in talk))
    return lengths


def _exchanges(template: Template, turns: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Returns each question, the question with its answer as one text, and whether it has an answer."""
    exchanges = []
    for question, answer in zip(turns[::2], [*turns[1::2], None]):
        asked = template.asked(question)
        answered = "" if answer is None else template.gap + answer
        exchanges.append((asked, asked + answered, answer is not None))
    return exchanges


def _template_parts(
    cfg: Experiment, tokenizer: Tokenizer, turns: Sequence[str], images: Iterator[Fields]
) -> list[Part]:
    template, eos = TEMPLATES[cfg.data.template], [tokenizer.eos_id]
    parts: list[Part] = []
    for asked, text, is_answered in _exchanges(template, turns):
        if not parts:
            parts += _begin(cfg, tokenizer, asked)
        parts += _text(tokenizer, text, len(asked), images)
        parts += [(text_fields(eos), [True], 0)] * is_answered
    return parts


def _begin(cfg: Experiment, tokenizer: Tokenizer, asked: str) -> list[Part]:
    """The token before a conversation whose first question is `asked`; none where none is needed."""
    begin = cfg.data.bos_id
    if begin is None:
        images = itertools.repeat(image_fields(cfg))
        parts = _text(tokenizer, asked, len(asked), images)
        if any(len(fields["tokens"]) for fields, _, _ in parts):
            return []
        begin = tokenizer.begin_id
    return [(text_fields([begin]), [False], 0)]


def _checkpoint_parts(
    cfg: Experiment, tokenizer: Tokenizer, turns: Sequence[str], images: Iterator[Fields]
) -> list[Part]:
    """Tokens as the checkpoint's own processor writes them, with `image_fields` at the placeholder of every image."""
    ids, scored, is_image = tokenizer.dialogue.encode(turns)
    parts, begin = [], 0
    for position in np.flatnonzero(is_image):
        parts.append((text_fields(ids[begin:position]), scored[begin:position], 0))
        image = next(images, text_fields([]))  # there are none for a model that reads no images
        parts.append((image, [False] * len(image["tokens"]), 1))
        begin = position + 1
    return [*parts, (text_fields(ids[begin:]), scored[begin:], 0)]


def _text(
    tokenizer: Tokenizer, text: str, scored_from: int, images: Iterator[Fields]
) -> list[Part]:
    """A text, with the next image at every mark; a token is scored if part of it lies beyond `scored_from`.

    The whole text is tokenized at once, since a tokenizer may put a space before a text.
    """
    ids, ends = tokenizer.encode_marked(text, IMAGE_PLACEHOLDER)
    parts, begin = [], 0
    for position in [i for i, token in enumerate(ids) if token is None]:
        parts.append(_words(ids, ends, begin, position, scored_from))
        image = next(images)
        parts.append((image, [False] * len(image["tokens"]), 1))
        begin = position + 1
    return [*parts, _words(ids, ends, begin, len(ids), scored_from)]


def _words(ids: list[int], ends: list[int], begin: int, end: int, scored_from: int) -> Part:
    return text_fields(ids[begin:end]), [last > scored_from for last in ends[begin:end]], 0


def prompt_row(
    cfg: Experiment,
    tokenizer: Tokenizer,
    prompt: str,
    tiles: Sequence[int],
    length: int | None = None,
    answer: str | None = None,
) -> Fields:
    """A question -> the fields of a row to continue, image_mask (length, I * J); padded on the left.

    With an `answer`, the row has it, too, and `targets` and `loss_weights` that score it. `tiles` has the number of
    tiles of every image. Images that have no mark in the prompt stand before it, each in a line of its own.

    Raises:
      ConfigError: the prompt has another number of marks, or is longer than `length`.
    """
    images, views = len(tiles), cfg.vision.views
    prompt = prompt if IMAGE_PLACEHOLDER in prompt else f"{IMAGE_PLACEHOLDER}\n" * images + prompt
    if prompt.count(IMAGE_PLACEHOLDER) != images:
        raise ConfigError(
            f"a prompt has {prompt.count(IMAGE_PLACEHOLDER)} marks {IMAGE_PLACEHOLDER} for {images} images: {prompt!r}"
        )
    row = encode(cfg, tokenizer, [prompt] if answer is None else [prompt, answer], tiles)
    seen, tags = row.pop("images_seen"), row.pop("image_tags")
    is_read = np.arange(images) < seen[:, None]
    if cfg.fusion.placeholder:
        is_read &= np.arange(images) >= row.pop("images_from")[:, None]
    is_read = np.repeat(is_read, views, axis=1)
    unused = ("targets", "loss_weights") if answer is None else ()
    row = {name: values for name, values in row.items() if name not in unused} | {
        "positions": np.arange(len(seen), dtype=np.int32),
        "segment_ids": np.ones_like(seen),
        "branch_ids": np.full_like(seen, TRUNK),
        "image_mask": only_own_tile(is_read & views_there(tiles, cfg.vision), tags),
    }
    length = len(seen) if length is None else length
    if len(seen) > length:
        raise ConfigError(
            f"a prompt takes {len(seen)} tokens with its images, more than the {length} that there are"
        )
    return padded(cfg, row, length - len(seen), length)
