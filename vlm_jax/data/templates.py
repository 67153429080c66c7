"""Formats a conversation: turns -> tokens, the scored ones among them, and its images.

    plain       question \\n answer <eos> question \\n answer <eos>
    vicuna      USER: question ASSISTANT: answer <eos> USER: question ASSISTANT: answer <eos>
    caption     answer <eos>
    checkpoint  the chat template or prompt form of the checkpoint (hub/text/dialogue.py)

vicuna is LLaVA 1.5's (Liu et al. 2023, as spelled in its published tokenizer folder). caption drops
the human's text but keeps its images, as LLaVA's first stage does. The answers and the <eos> after
each are scored. An image is inserted at its placeholder and visible from there on: as its tokens if
the fusion style puts images into the sequence, otherwise only to cross-attention.

A system turn precedes the first question of vicuna, separated by a space. plain and caption have
none.

A conversation begins with `data.bos_id`. Without one, a begin token (`Tokenizer.begin_id`) precedes
a first question without tokens, so that a token predicts the first token of every
answer: a caption without an image in the sequence is `<eos> answer <eos>`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from vlm_jax.config import CheckpointError, ConfigError, DataError, Experiment
from vlm_jax.data.conversation_parts import (
    TEMPLATES,
    Part,
    checkpoint_parts,
    exchanges,
    template_parts,
)
from vlm_jax.data.conversations import Conversation, Conversations
from vlm_jax.data.fields import (
    Fields,
    concat_fields,
    fields_of_images,
    image_blocks,
    image_fields,
    pad_left,
    restrict_tags,
    rope_fields,
    tap_fields,
)
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.data.tiling import Tiles, view_mask
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import NO_IMAGE


def check_system_turns(cfg: Experiment, source: Conversations) -> None:
    """Raises ConfigError if conversations have a system turn and `data.template` has none.

    A chat template of a checkpoint is checked when it is used.
    """
    if source.first_system:
        _check_system_turn(cfg, source.first_system)


def _check_system_turn(cfg: Experiment, place: str) -> None:
    """Raises ConfigError if `data.template` has no form for the system turn at a place."""
    name = cfg.data.template
    if name in TEMPLATES and TEMPLATES[name].after_system is None:
        others = [key for key, template in TEMPLATES.items() if template.after_system is not None]
        raise ConfigError(
            f"data.template {name} has no system turn, but {place} has: choose "
            f"{', '.join(others)} or checkpoint, or remove the system turns."
        )


def has_system_turn(cfg: Experiment, tokenizer: Tokenizer) -> bool:
    """Returns whether `data.template` has a form for a system turn."""
    if cfg.data.template == "checkpoint":
        return tokenizer.dialogue.takes_system_turn
    return TEMPLATES[cfg.data.template].after_system is not None


def encode(
    cfg: Experiment,
    tokenizer: Tokenizer,
    turns: Sequence[str],
    tiles: Sequence[Tiles],
    system: str | None = None,
) -> Fields:
    """Encodes turns; the last may be a question that is to be answered.

    `tiles` has the tiles of the image of each placeholder, `system` the text of the system
    turn.

    Returns:
      Fields of shape (N,). `image_token_index` and `image_tags` count the image tokens and views of
      this conversation alone. A token may read the first `images_seen` images: those up to it, or,
      if it predicts an answer, all before the predicted token. With `fusion.placeholder` it reads
      only the last of them and the images whose placeholders directly precede it, from number
      `images_from` on.

    Source: Alayrac et al. 2022 (Flamingo), section 2.3; transformers,
    `get_cross_attention_token_mask` of models/mllama.

    Raises:
      ConfigError: `data.template` has no system turn.
    """
    if system is not None:
        _check_system_turn(cfg, "a prompt")
    images = fields_of_images(cfg, tiles)
    if cfg.data.template == "checkpoint":
        parts = checkpoint_parts(tokenizer, turns, images, system)
    else:
        parts = template_parts(cfg, tokenizer, turns, images, system)
    lengths = [len(part.is_scored) for part in parts]
    is_image = [part.is_image for part in parts]
    is_scored = np.concatenate([np.asarray(part.is_scored, bool) for part in parts])  # (N,)
    fields = concat_fields([part.fields for part in parts])
    # The last token predicts an answer that is to follow.
    predicts_answer = np.append(is_scored[1:], True)
    seen = np.repeat(np.cumsum(is_image), lengths)
    # An image that is not in the sequence may lie between a token and the next.
    seen_by_next = np.append(seen[1:], sum(is_image))
    fields |= {
        "images_seen": np.where(predicts_answer, seen_by_next, seen).astype(np.int32),
        "image_tags": np.where(predicts_answer, np.int32(NO_IMAGE), fields["image_tags"]),
        "targets": np.append(fields["tokens"][1:], np.int32(cfg.data.special_ids[0])),
        "loss_weights": np.append(is_scored[1:], False).astype(np.float32),
    }
    fields |= tap_fields(cfg, fields) | rope_fields(cfg, fields["image_token_index"], tiles)
    if cfg.fusion.placeholder:
        fields["images_from"] = _first_image_read(parts)[fields["images_seen"]]
    if cfg.fusion.is_prefix_lm:
        # The tokens before the first answer.
        fields["block_ids"] = (np.cumsum(is_scored) == 0).astype(np.int32)
    if cfg.fusion.has_image_blocks:
        fields["block_ids"] = image_blocks(cfg, fields["image_token_index"])
    return fields


def _first_image_read(parts: Sequence[Part]) -> np.ndarray:
    """Returns the number of the first image that a token reads, by how many images it has seen."""
    starts: list[int] = []
    is_adjacent = False  # to the image before: no text between them
    for part in parts:
        if part.is_image:
            starts.append(starts[-1] if is_adjacent else len(starts))
            is_adjacent = True
        elif len(part.is_scored):
            is_adjacent = False
    return np.array([0, *starts], np.int32)


def cut(cfg: Experiment, fields: Fields, tiles: Sequence[Tiles], length: int) -> Fields:
    """Cuts the fields of `encode` to at most `length` tokens, and never within an image."""
    seen = fields["images_seen"]
    if len(seen) <= length:
        return fields
    # The number of the image that the first token beyond the cut belongs to or follows.
    number = int(seen[length])
    end = length
    if number > 0:
        start = int(np.searchsorted(seen, number))
        if length < start + len(image_fields(cfg, tiles[number - 1])["tokens"]):
            end = start
    return {name: values[:end] for name, values in fields.items()}


def max_token_counts(
    cfg: Experiment,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    locate: Callable[[int], str] = str,
) -> list[int]:
    """Returns an upper bound on the number of tokens of each conversation.

    It counts a begin token, and the most tiles for every image. The texts are tokenized together,
    on all cores.

    Args:
      locate: returns the location of the n-th of `conversations`, for error messages.

    Raises:
      DataError: the checkpoint's chat template cannot write a conversation.
    """
    # A placeholder counts as one token already.
    more_per_image = cfg.image_slots_in_row - 1
    counts = []
    if cfg.data.template == "checkpoint":
        for number, conversation in enumerate(conversations):
            try:
                ids, _, is_image = tokenizer.dialogue.encode(
                    conversation.turns, conversation.system
                )
            except CheckpointError as error:
                raise DataError(f"{locate(number)}: {error}") from None
            counts.append(len(ids) + int(np.sum(is_image)) * more_per_image)
        return counts
    template = TEMPLATES[cfg.data.template]
    written = [exchanges(template, each.turns, each.system) for each in conversations]
    texts = [exchange.text for conversation in written for exchange in conversation]
    token_counts = iter(tokenizer.count_tokens(texts, IMAGE_PLACEHOLDER))
    for conversation in written:
        count = 1  # the begin token
        for exchange in conversation:
            images = exchange.text.count(IMAGE_PLACEHOLDER)
            end = int(exchange.has_answer)  # its <eos>
            count += next(token_counts) + images * more_per_image + end
        counts.append(count)
    return counts


def prompt_row(
    cfg: Experiment,
    tokenizer: Tokenizer,
    prompt: str,
    tiles: Sequence[Tiles],
    length: int | None = None,
    answer: str | None = None,
    history: Sequence[str] = (),
    system: str | None = None,
) -> Fields:
    """Returns the fields of a row to continue with an answer, padded on the left.

    Images precede turns without placeholders, each on a separate line.

    Args:
      cfg: the experiment.
      tokenizer: its tokenizer.
      prompt: a question.
      tiles: the tiles of each image.
      length: of the row, by default without padding.
      answer: follows the prompt. The row then has `targets` and `loss_weights` that score it, and
        the answers of `history`.
      history: questions and answers before the prompt.
      system: text of the system turn before them.

    Raises:
      ConfigError: the turns have another number of placeholders, or are longer than `length`.
    """
    images = len(tiles)
    turns = [*history, prompt]
    placeholders = sum(turn.count(IMAGE_PLACEHOLDER) for turn in turns)
    if not placeholders:
        turns[0] = "\n".join([IMAGE_PLACEHOLDER] * images + turns[:1])
        placeholders = images
    owner = "a prompt"
    if answer is not None:
        turns.append(answer)
        placeholders += answer.count(IMAGE_PLACEHOLDER)
        owner = "a prompt with its answer"
    if placeholders != images:
        raise ConfigError(
            f"{owner} has {placeholders} {IMAGE_PLACEHOLDER} placeholders for {images} images: "
            f"{prompt!r}."
        )
    row = encode(cfg, tokenizer, turns, tiles, system)
    seen, tags = row.pop("images_seen"), row.pop("image_tags")  # (N,)
    is_read = np.arange(images) < seen[:, None]  # (N, images)
    if cfg.fusion.placeholder:
        is_read &= np.arange(images) >= row.pop("images_from")[:, None]
    image_mask = np.repeat(is_read, cfg.vision.views, axis=1)  # (N, I)
    image_mask &= view_mask(tiles, cfg.vision)
    if answer is None:
        del row["targets"], row["loss_weights"]
    row |= {
        "positions": np.arange(len(seen), dtype=np.int32),
        "segment_ids": np.ones_like(seen),
        "image_mask": restrict_tags(image_mask, tags),
    }
    return pad_left(cfg, row, length)
