"""Text -> rows of tokens: the form of a prompt, the shift of the labels, and which tokens are scored.

A training row is one segment. The image is its trunk, every question with its answer is a branch:

    tokens     <image> <image> | what shape ? \\n  circle <eos> | is it red ? \\n  yes  <eos> | <pad>
    branch        0       0    |  1     1   1  1     1      1   |  2  2  2  2  2   2     2   |   0
    position      0       1    |  2     3   4  5     6      7   |  2  3  4  5  6   7     8   |   0
    scored        .       .    |  .     .   .  x     x      .   |  .  .  .  .  x   x     .   |   .

A position is scored where the *next* token belongs to an answer. Where images are cut into tiles (data/tiling.py), the
trunk has a tag for each of them and behind it, where images stand in the sequence, its tokens:

    unified           <tile_1> <image> <image> <tile_2> <image> <image> <tile_global_thumbnail> <image> <image>
    hybrid            <tile_1> <tile_2> <tile_global_thumbnail> <image> <image>
    cross_attention   <tile_1> <tile_2> <tile_global_thumbnail>

A tag may read the view that it names, and no other; all other tokens may read every view of their images.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data.tiling import views_there
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import NO_IMAGE, PADDING, TRUNK

Fields = dict[str, np.ndarray]  # of a row
Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt and of its answer

# What stands in a slot that holds no token, beside the padding token; the types of a row's fields.
FILL = {
    "image_tags": np.int32(NO_IMAGE),
    "positions": np.int32(0),
    "segment_ids": np.int32(PADDING),
    "branch_ids": np.int32(TRUNK),
    "block_ids": np.int32(0),
    "image_token_index": np.int32(NO_IMAGE),
    "image_mask": np.bool_(False),
    "loss_weights": np.float32(0),
}


def prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """The tokens of a question: at least one, also where the tokenizer has none for white space."""
    return tokenizer.encode(question) + tokenizer.encode("\n") or [tokenizer.begin_id]


def begin_ids(cfg: Experiment) -> list[int]:
    """The token that begins every row, if there is one."""
    return [] if cfg.data.bos_id is None else [cfg.data.bos_id]


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    return [*tokenizer.encode(answer), tokenizer.eos_id]


@functools.lru_cache
def image_fields(cfg: Experiment, tiles: int = 1, number: int = 0) -> Fields:
    """What stands in the sequence for the `number`-th image, one of so many tiles; (N,) int32 each, not to be changed:

    tokens: with `fusion.placeholder` one <image>; tags of the views and grids of <image>, row after row, the tags alone
      where the fusion puts no image into the sequence; with `vision.newline_token` every row of a grid ends in a
      <newline>;
    image_token_index: which of the I * M image tokens stands there, or NO_IMAGE;
    image_tags: which of the I views the token is a tag of, or NO_IMAGE.
    """
    rows, columns = cfg.projector.output_grid(cfg.vision)
    _, image, newline, _ = cfg.data.special_ids
    grid = np.full((rows, columns + cfg.vision.newline_token), image)
    grid[:, columns:] = newline
    slots = np.full_like(grid, NO_IMAGE)
    slots[:, :columns] = np.arange(rows * columns).reshape(rows, columns)
    views = np.flatnonzero(views_there([tiles], cfg.vision)).tolist()
    shown = views[len(views) - min(cfg.views_in_sequence, len(views)) :]
    parts = [text_fields([image] if cfg.fusion.placeholder else [])]
    for view in views:
        place = number * cfg.vision.views + view
        tag = text_fields(cfg.tile_tags[view] if cfg.tile_tags else [])
        parts.append(tag | {"image_tags": np.full_like(tag["tokens"], place)})
        if view in shown:
            own = moved(slots.reshape(-1), place * cfg.image_tokens)
            parts.append(text_fields(grid.reshape(-1)) | {"image_token_index": own})
    return joined(parts)


def text_fields(ids: Sequence[int]) -> Fields:
    """`image_fields` of tokens of text."""
    tokens = np.array(ids, np.int32)
    return {
        "tokens": tokens,
        **dict.fromkeys(("image_token_index", "image_tags"), np.full_like(tokens, NO_IMAGE)),
    }


def joined(parts: Sequence[Fields]) -> Fields:
    """Fields one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def moved(numbers: np.ndarray, by: np.ndarray | int) -> np.ndarray:
    """Numbers of image tokens or of views, counted from another place; NO_IMAGE stays."""
    return np.where(numbers == NO_IMAGE, NO_IMAGE, numbers + by).astype(np.int32)


def only_own_tile(image_mask: np.ndarray, image_tags: np.ndarray) -> np.ndarray:
    """(..., S, I * J) bool and (..., S): the views that a token may read, of a tag none but its own."""
    views, tags = np.arange(image_mask.shape[-1]), image_tags[..., None]
    return image_mask & ((tags == NO_IMAGE) | (tags == views))


def fitting(cfg: Experiment, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that a row takes: those that do not fit any more are left out.

    Raises:
      ConfigError: a pair would not fit in a row of its own.
    """
    begin, kept = len(begin_ids(cfg)), []
    room = cfg.data.text_length - begin
    for prompt, answer in pairs:
        length = len(prompt) + len(answer)
        if begin + length > cfg.data.text_length:
            raise ConfigError(
                f"data.text_length {cfg.data.text_length} is too short: a question takes {begin + length} tokens"
            )
        if length <= room:
            kept.append((prompt, answer))
            room -= length
    return kept


def pack_row(cfg: Experiment, pairs: Sequence[Pair], tiles: int = 1) -> Fields:
    """One image and its questions -> the fields of a training row of length S = cfg.row_length, image_mask (S, J).

    It has those of the pairs that are `fitting`.
    """
    kept = fitting(cfg, pairs)
    row = _segment(cfg, [tiles], [[*prompt, *answer] for prompt, answer in kept])
    same_branch = row["branch_ids"][:-1] == row["branch_ids"][1:]
    lengths = [np.sum(row["branch_ids"] == TRUNK), *(len(part) for pair in kept for part in pair)]
    answered = np.repeat([False] + [False, True] * len(kept), lengths)
    if cfg.fusion.prefix == "bidirectional":
        row["block_ids"] = (~answered).astype(np.int32)
    pad = cfg.data.special_ids[0]
    row["targets"] = np.append(np.where(same_branch, row["tokens"][1:], pad), pad)
    row["loss_weights"] = np.append(same_branch & answered[1:], False)
    return padded(cfg, row, 0, cfg.row_length)


def prompt_row(
    cfg: Experiment,
    prompt: Sequence[int],
    tiles: Sequence[int] = (1,),
    length: int | None = None,
    answer: Sequence[int] = (),
) -> Fields:
    """The same trunk and one prompt as its branch -> the fields of a row to continue, image_mask (length, I * J).

    `tiles` has the number of tiles of every image. Padded on the left, so that prompts of several lengths all end in
    the last slot:

        tokens   <pad> <pad> <image> <image> is it red ? \\n

    With an `answer`, the row has it, too, and `targets` and `loss_weights` that score it.
    """
    row = _segment(cfg, tiles, [[*prompt, *answer]])
    slots, first = np.arange(len(row["tokens"])), len(row["tokens"]) - len(answer)
    if cfg.fusion.prefix == "bidirectional":
        row["block_ids"] = (slots < first).astype(np.int32)
    if answer:
        row["targets"] = np.append(row["tokens"][1:], cfg.data.special_ids[0])
        row["loss_weights"] = (slots >= first - 1) & (slots < len(slots) - 1)
    needed = len(row["tokens"])
    length = needed if length is None else length
    if needed > length:
        raise ConfigError(
            f"a prompt takes {needed} tokens with its images, more than the {length} that there are"
        )
    return padded(cfg, row, length - needed, length)


def _segment(cfg: Experiment, tiles: Sequence[int], branches: Sequence[Sequence[int]]) -> Fields:
    """Images as a trunk, and its branches, end to end, without padding."""
    images = [image_fields(cfg, count, number) for number, count in enumerate(tiles)]
    begin = text_fields(begin_ids(cfg))
    trunk = (
        [*images, begin] if cfg.fusion.placeholder else [begin, *images]
    )  # as the models of each kind have it
    size = sum(len(part["tokens"]) for part in trunk)
    lengths = np.array([size, *map(len, branches)])
    starts = np.cumsum(lengths) - lengths
    starts[1:] -= size  # every branch goes on where the trunk ended
    fields = joined([*trunk, text_fields(list(itertools.chain(*branches)))])
    tokens, slots, tags = fields.values()
    there = np.broadcast_to(
        views_there(tiles, cfg.vision), (len(tokens), len(tiles) * cfg.vision.views)
    )
    return {
        "tokens": tokens,
        "positions": np.arange(len(tokens)) - np.repeat(starts, lengths),
        "segment_ids": np.ones_like(tokens),
        "branch_ids": np.repeat(np.arange(len(lengths)), lengths),
        "image_token_index": slots,
        "image_mask": only_own_tile(there, tags),
    }


def padded(cfg: Experiment, row: Fields, before: int, length: int) -> Fields:
    """The row with `before` empty slots in front and as many behind as `length` asks for."""
    padded, pad = {}, np.int32(cfg.data.special_ids[0])
    for name, values in row.items():
        padded[name] = np.full(
            (length, *values.shape[1:]), pad if name in ("tokens", "targets") else FILL[name]
        )
        padded[name][before : before + len(values)] = values
    return padded
