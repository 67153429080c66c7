"""The form of a conversation: turns -> tokens, what of them is scored, and where images stand.

    plain      question \\n answer <eos> question \\n answer <eos>
    vicuna     USER: question ASSISTANT: answer <eos> USER: question ASSISTANT: answer <eos>
    caption    answer <eos>
    checkpoint what the chat template or the prompt form of the checkpoint makes of it (hub/dialogue.py)

vicuna is that of LLaVA 1.5 (Liu et al. 2023, as its published tokenizer folder spells it). caption drops what the human
says but for the images, as LLaVA's first stage does. Scored are the answers and the <eos> after each. An image stands
where its mark is, and is seen from there on: in the sequence as its tokens, otherwise as nothing but what may be read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data.conversations import MARK
from vlm_jax.data.text import Fields, image_fields, joined, only_own_tile, padded, plain_fields
from vlm_jax.data.tiles import views_there
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import TRUNK

Part = tuple[Fields, Sequence[bool], int]  # fields, which of them are scored, and how many images they are


@dataclass(frozen=True)
class Template:
    before: str = ""  # a question
    after: str = ""  # a question
    gap: str = ""  # before an answer
    keeps_question: bool = True

    def asked(self, question: str) -> str:
        return self.before + (question if self.keeps_question else MARK * question.count(MARK)) + self.after


TEMPLATES = {
    "plain": Template(after="\n"),
    "vicuna": Template(before="USER: ", after=" ASSISTANT:", gap=" "),
    "caption": Template(keeps_question=False),
}


def encode(cfg: Experiment, tokenizer: Tokenizer, turns: Sequence[str], tiles: Sequence[int]) -> Fields:
    """Turns -> the fields of their tokens, (N,) each; the last turn may be a question that is to be answered.

    `tiles` has the number of tiles of every marked image. `image_slots` and `image_tags` count the image tokens and the
    views of this conversation alone; `images_seen` says how many of its images stand before a token or at it.
    """
    images = (image_fields(cfg, count, number) for number, count in enumerate(tiles))
    if cfg.data.template == "checkpoint":
        parts = _checkpoint_parts(cfg, tokenizer, turns, images)
    else:
        parts = _template_parts(cfg, tokenizer, turns, images)
    scored = np.concatenate([np.asarray(those, bool) for _, those, _ in parts])
    lengths, shown = [len(those) for _, those, _ in parts], [number for _, _, number in parts]
    fields = joined([fields for fields, _, _ in parts])
    fields |= {
        "images_seen": np.repeat(np.cumsum(shown), lengths).astype(np.int32),
        "targets": np.append(fields["tokens"][1:], np.int32(cfg.data.special_ids[0])),
        "loss_weights": np.append(scored[1:], False).astype(np.float32),
    }
    if cfg.fusion.prefix == "bidirectional":  # all that stands before the first answer
        fields["block_ids"] = (np.cumsum(scored) == 0).astype(np.int32)
    return fields


def _template_parts(
    cfg: Experiment, tokenizer: Tokenizer, turns: Sequence[str], images: Iterator[Fields]
) -> list[Part]:
    template, eos = TEMPLATES[cfg.data.template], [tokenizer.eos_id]
    begin = [] if cfg.data.bos_id < 0 else [cfg.data.bos_id]
    parts = [(plain_fields(begin), [False] * len(begin), 0)]
    for question, answer in zip(turns[::2], [*turns[1::2], None]):
        asked = template.asked(question)
        said = "" if answer is None else template.gap + answer
        parts += _text(tokenizer, asked + said, len(asked), images)
        parts += [(plain_fields(eos), [True], 0)] * (answer is not None)
    return parts


def _checkpoint_parts(
    cfg: Experiment, tokenizer: Tokenizer, turns: Sequence[str], images: Iterator[Fields]
) -> list[Part]:
    """Tokens as the checkpoint's own processor writes them, with `image_fields` at the placeholder of every image.

    A placeholder stays in the text, before the fields, where the fusion puts no image into the sequence.
    """
    ids, scored, is_image = tokenizer.dialogue.encode(turns)
    keeps_placeholder = cfg.fusion.has_images and not cfg.fusion.image_in_sequence
    parts, begin = [], 0
    for position in np.flatnonzero(is_image):
        parts.append((plain_fields(ids[begin:position]), scored[begin:position], 0))
        image = next(images, plain_fields([]))  # there are none for a model that reads no images
        if keeps_placeholder and ids[position] >= 0:
            image = joined([plain_fields([ids[position]]), image])
        parts.append((image, [False] * len(image["tokens"]), 1))
        begin = position + 1
    return [*parts, (plain_fields(ids[begin:]), scored[begin:], 0)]


def _text(tokenizer: Tokenizer, text: str, scored_from: int, images: Iterator[Fields]):
    """A text, with the next image at every mark; a token is scored that has something of what follows `scored_from`.

    The whole text is one to the tokenizer, since one that puts a space before a text would put it before an answer.
    """
    parts, begin = [], 0
    for number, piece in enumerate(text.split(MARK)):
        if number:
            image = next(images)
            parts.append((image, [False] * len(image["tokens"]), 1))
            begin += len(MARK)
        ids, ends = tokenizer.encode_with_ends(piece) if piece else ([], [])
        parts.append((plain_fields(ids), [begin + end > scored_from for end in ends], 0))
        begin += len(piece)
    return parts


def prompt_row(
    cfg: Experiment, tokenizer: Tokenizer, prompt: str, tiles: Sequence[int], length: int | None = None
) -> Fields:
    """A question -> the fields of a row to continue, image_mask (length, I * J); padded on the left.

    `tiles` has the number of tiles of every image. Images that have no mark in the prompt stand before it, each in a
    line of its own.

    Raises:
      ConfigError: the prompt has another number of marks, or is longer than `length`.
    """
    images, views = len(tiles), cfg.vision.views
    prompt = prompt if MARK in prompt else f"{MARK}\n" * images + prompt
    if prompt.count(MARK) != images:
        raise ConfigError(f"a prompt has {prompt.count(MARK)} marks {MARK} for {images} images: {prompt!r}")
    row = encode(cfg, tokenizer, [prompt], tiles)
    seen, tags = row.pop("images_seen"), row.pop("image_tags")
    is_before = np.repeat(np.arange(images) < seen[:, None], views, axis=1)
    row = {name: values for name, values in row.items() if name not in ("targets", "loss_weights")} | {
        "positions": np.arange(len(seen), dtype=np.int32),
        "segment_ids": np.ones_like(seen),
        "branch_ids": np.full_like(seen, TRUNK),
        "image_mask": only_own_tile(is_before & views_there(tiles, cfg.vision), tags),
    }
    length = len(seen) if length is None else length
    if len(seen) > length:
        raise ConfigError(f"a prompt takes {len(seen)} tokens with its images, more than the {length} that there are")
    return padded(cfg, row, length - len(seen), length)
