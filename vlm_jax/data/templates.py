"""The form of a conversation: turns -> tokens, what of them is scored, and where images stand.

    plain      question \\n answer <eos> question \\n answer <eos>
    vicuna     USER: question ASSISTANT: answer <eos> USER: question ASSISTANT: answer <eos>
    caption    answer <eos>

vicuna is that of LLaVA 1.5 (Liu et al. 2023, as its published tokenizer folder spells it). caption drops what the human
says but for the images, as LLaVA's first stage does. Scored are the answers and the <eos> after each. An image stands
where its mark is, and is seen from there on: in the sequence as its tokens, otherwise as nothing but what may be read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data.conversations import MARK
from vlm_jax.data.text import Fields, Tokenizer, image_ids, padded
from vlm_jax.structs import NO_IMAGE, TRUNK


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


def encode(cfg: Experiment, tokenizer: Tokenizer, turns: Sequence[str]) -> Fields:
    """Turns -> the fields of their tokens, (N,) each; the last turn may be a question that is to be answered.

    `image_slots` counts the image tokens of this conversation alone; `images_seen` says how many of its images stand
    before a token or at it.
    """
    template, eos = TEMPLATES[cfg.data.template], [tokenizer.eos_id]
    in_place = image_ids(cfg)
    begin = [] if cfg.data.bos_id < 0 else [cfg.data.bos_id]
    parts = [(begin, [False] * len(begin), 0)]  # tokens, whether they are scored, how many images they are
    for question, answer in zip(turns[::2], [*turns[1::2], None]):
        asked = template.asked(question)
        said = "" if answer is None else template.gap + answer
        parts += _text(tokenizer, asked + said, len(asked), in_place)
        parts += [(eos, [True], 0)] * (answer is not None)
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _, _ in parts])
    scored = np.concatenate([np.asarray(those, bool) for _, those, _ in parts])
    lengths, images = [len(ids) for ids, _, _ in parts], [number for _, _, number in parts]
    is_image = np.repeat(np.array(images, bool), lengths) & (tokens == cfg.data.special_ids[1])
    fields = {
        "tokens": tokens,
        "image_slots": np.where(is_image, np.cumsum(is_image) - 1, NO_IMAGE).astype(np.int32),
        "images_seen": np.repeat(np.cumsum(images), lengths).astype(np.int32),
        "targets": np.append(tokens[1:], np.int32(cfg.data.special_ids[0])),
        "loss_weights": np.append(scored[1:], False).astype(np.float32),
    }
    if cfg.fusion.prefix == "bidirectional":  # all that stands before the first answer
        fields["block_ids"] = (np.cumsum(scored) == 0).astype(np.int32)
    return fields


def _text(tokenizer: Tokenizer, text: str, scored_from: int, in_place: np.ndarray):
    """A text, its marks replaced by image tokens; a token is scored that has something of what follows `scored_from`.

    The whole text is one to the tokenizer, since one that puts a space before a text would put it before an answer.
    """
    parts, begin = [], 0
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append((in_place, [False] * len(in_place), 1))
            begin += len(MARK)
        ids, ends = tokenizer.encode_with_ends(piece) if piece else ([], [])
        parts.append((ids, [begin + end > scored_from for end in ends], 0))
        begin += len(piece)
    return parts


def prompt_row(cfg: Experiment, tokenizer: Tokenizer, prompt: str, images: int, length: int | None = None) -> Fields:
    """A question -> the fields of a row to continue, image_mask (length, images); padded on the left.

    Images that have no mark in the prompt stand before it, each in a line of its own.

    Raises:
      ConfigError: the prompt has another number of marks, or is longer than `length`.
    """
    prompt = prompt if MARK in prompt else f"{MARK}\n" * images + prompt
    if prompt.count(MARK) != images:
        raise ConfigError(f"a prompt has {prompt.count(MARK)} marks {MARK} for {images} images: {prompt!r}")
    row = encode(cfg, tokenizer, [prompt])
    seen = row.pop("images_seen")
    row = {name: values for name, values in row.items() if name not in ("targets", "loss_weights")} | {
        "positions": np.arange(len(seen), dtype=np.int32),
        "segment_ids": np.ones_like(seen),
        "branch_ids": np.full_like(seen, TRUNK),
        "image_mask": np.arange(images) < seen[:, None],
    }
    length = len(seen) if length is None else length
    if len(seen) > length:
        raise ConfigError(f"a prompt takes {len(seen)} tokens with its images, more than the {length} that there are")
    return padded(cfg, row, length - len(seen), length)
