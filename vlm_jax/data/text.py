"""Makes rows of tokens from questions: prompt form, label shift, scored tokens.

A training row is one segment. The image is its trunk; every question with its answer is a branch:

    tokens    <image> <image> | what shape ? \\n circle <eos> | is it red ? \\n yes <eos> | <pad>
    branch       0       0    |  1     1   1  1    1      1   |  2  2  2  2  2   2    2   |   0
    position     0       1    |  2     3   4  5    6      7   |  2  3  4  5  6   7    8   |   0
    scored       .       .    |  .     .   .  x    x      .   |  .  .  .  .  x   x    .   |   .

A position is scored if the *next* token belongs to an answer. If images are cut into tiles
(data/tiling.py), the trunk has a tag for each tile, followed by its tokens if the image is in the
sequence:

    i = <image>
    unified          <tile_1> i i <tile_2> i i <tile_global_thumbnail> i i
    hybrid           <tile_1> <tile_2> <tile_global_thumbnail> i i
    cross_attention  <tile_1> <tile_2> <tile_global_thumbnail>

A tag may read the view that it names and no other; all other tokens may read every view of their
images.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data.fields import (
    Fields,
    concat_fields,
    fields_of_images,
    image_blocks,
    pad_left,
    pad_row,
    restrict_tags,
    rope_fields,
    tap_fields,
    text_fields,
)
from vlm_jax.data.tiling import Tiles, view_mask
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import TRUNK

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt and of its answer


def prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """Returns the tokens of a question: at least one, even if a tokenizer drops white space."""
    return tokenizer.encode(question) + tokenizer.encode("\n") or [tokenizer.begin_id]


def begin_ids(cfg: Experiment) -> list[int]:
    """Returns the token that begins every row, if there is one."""
    return [] if cfg.data.bos_id is None else [cfg.data.bos_id]


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Returns the tokens of an answer and the end of text."""
    return [*tokenizer.encode(answer), tokenizer.eos_id]


def encode_pair(tokenizer: Tokenizer, question: str, answer: str) -> Pair:
    """Returns `prompt_ids` of a question and `answer_ids` of its answer."""
    return prompt_ids(tokenizer, question), answer_ids(tokenizer, answer)


def drop_overflow(cfg: Experiment, pairs: Sequence[Pair]) -> list[Pair]:
    """Drops the pairs that no longer fit a row, given in order.

    Raises:
      ConfigError: a pair would not fit an otherwise empty row.
    """
    begin = len(begin_ids(cfg))
    free = cfg.data.text_length - begin
    fitting = []
    for prompt, answer in pairs:
        length = len(prompt) + len(answer)
        if begin + length > cfg.data.text_length:
            raise ConfigError(
                f"data.text_length {cfg.data.text_length} is too short: a question has "
                f"{begin + length} tokens with its answer."
            )
        if length <= free:
            fitting.append((prompt, answer))
            free -= length
    return fitting


def fill_rows(cfg: Experiment, pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Distributes all pairs over rows of at most `data.questions_per_row`, in order.

    Raises:
      ConfigError: a pair does not fit an empty row.
    """
    rows: list[list[Pair]] = []
    for pair in pairs:
        extended = [*rows[-1], pair] if rows else [pair]
        fits = len(drop_overflow(cfg, extended)) == len(extended)
        if rows and fits and len(extended) <= cfg.data.questions_per_row:
            rows[-1] = extended
        else:
            rows.append([pair])
    return rows


def pack_row(cfg: Experiment, pairs: Sequence[Pair], tiles: Tiles = 1) -> Fields:
    """Packs the pairs of `drop_overflow` behind one image of these tiles.

    Returns:
      The fields of a training row of length S = cfg.row_length; image_mask is (S, J).
    """
    pairs = drop_overflow(cfg, pairs)
    row = _segment(cfg, [tiles], [[*prompt, *answer] for prompt, answer in pairs])
    trunk_length = int(np.sum(row["branch_ids"] == TRUNK))
    lengths, is_answer = [trunk_length], [False]
    for prompt, answer in pairs:
        lengths += [len(prompt), len(answer)]
        is_answer += [False, True]
    in_answer = np.repeat(is_answer, lengths)  # (number of tokens,)
    if cfg.fusion.is_prefix_lm:
        row["block_ids"] = (~in_answer).astype(np.int32)
    # The target is the next token of the branch. The last token of a branch has none.
    pad = cfg.data.special_ids[0]
    same_branch = row["branch_ids"][:-1] == row["branch_ids"][1:]
    row["targets"] = np.append(np.where(same_branch, row["tokens"][1:], pad), pad)
    row["loss_weights"] = np.append(same_branch & in_answer[1:], False)
    return pad_row(cfg, row, 0, cfg.row_length)


def prompt_row(
    cfg: Experiment,
    prompt: Sequence[int],
    tiles: Sequence[Tiles] = (1,),
    length: int | None = None,
    answer: Sequence[int] = (),
) -> Fields:
    """Packs one prompt behind its images, in the form of a training row.

    The row is padded on the left, so that prompts of several lengths all end in the last slot:

        tokens   <pad> <pad> <image> <image> is it red ? \\n

    Args:
      cfg: the experiment.
      prompt: its tokens.
      tiles: the tiles of each image.
      length: of the row, by default without padding.
      answer: tokens after the prompt. The row then has `targets` and `loss_weights` for them.

    Returns:
      The fields of a row to continue; image_mask is (length, I), I = images * J.

    Raises:
      ConfigError: prompt and images are longer than `length`.
    """
    row = _segment(cfg, tiles, [[*prompt, *answer]])
    size = len(row["tokens"])
    slots = np.arange(size)
    answer_start = size - len(answer)
    if cfg.fusion.is_prefix_lm:
        row["block_ids"] = (slots < answer_start).astype(np.int32)
    if answer:
        row["targets"] = np.append(row["tokens"][1:], cfg.data.special_ids[0])
        row["loss_weights"] = (slots >= answer_start - 1) & (slots < size - 1)
    return pad_left(cfg, row, length)


def _segment(cfg: Experiment, tiles: Sequence[Tiles], branches: Sequence[Sequence[int]]) -> Fields:
    """Returns the fields of images as a trunk, followed by its branches, without padding."""
    # A text of the image replaces it: no token is an image token, and none reads the image.
    is_shown = not cfg.data.transcript
    images = list(fields_of_images(cfg, tiles)) if is_shown else []
    begin = text_fields(begin_ids(cfg))
    # Llama 3.2 Vision writes the placeholder before the begin token; other models begin with it.
    trunk = [*images, begin] if cfg.fusion.placeholder else [begin, *images]
    trunk_length = sum(len(part["tokens"]) for part in trunk)
    lengths = np.array([trunk_length, *map(len, branches)])
    starts = np.cumsum(lengths) - lengths
    # Every branch continues from the position where the trunk ends.
    starts[1:] -= trunk_length
    fields = concat_fields([*trunk, text_fields(list(itertools.chain(*branches)))])
    size = len(fields["tokens"])
    image_mask = np.broadcast_to(
        view_mask(tiles, cfg.vision) & is_shown, (size, len(tiles) * cfg.vision.views)
    )  # (N, I)
    segment = {
        "tokens": fields["tokens"],
        "positions": np.arange(size) - np.repeat(starts, lengths),
        "segment_ids": np.ones_like(fields["tokens"]),
        "branch_ids": np.repeat(np.arange(len(lengths)), lengths),
        "image_token_index": fields["image_token_index"],
        "image_mask": restrict_tags(image_mask, fields["image_tags"]),
    }
    segment |= tap_fields(cfg, fields)
    for name, values in rope_fields(cfg, fields["image_token_index"], tiles).items():
        # As the positions: every branch continues from the number where the trunk ends.
        end = values[:trunk_length].max(initial=-1) + 1
        steps = segment["positions"][trunk_length:, None] - trunk_length
        segment[name] = np.concatenate([values[:trunk_length], end + steps + np.zeros(3, np.int32)])
        segment[name] = segment[name].astype(np.int32)
    if cfg.fusion.has_image_blocks:
        segment["block_ids"] = image_blocks(cfg, fields["image_token_index"])
    return segment
