"""Conversations longer than a row: `data.too_long` truncates or drops them, or stops the run.

They are counted before training.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data import packing, templates
from vlm_jax.data.conversations import Conversation, Conversations, Selection
from vlm_jax.data.fields import Fields
from vlm_jax.data.tokenizer import Tokenizer

CHUNK_RECORDS = 1024  # tokenized together
NAMED_RECORDS = 3


@dataclass
class Cuts:
    """Counts over the conversations of a training split, filled one conversation at a time."""

    records: int = 0
    too_long: list[int] = field(default_factory=list)  # records longer than a row
    scored_tokens: int = 0  # of the records that are too long
    lost_tokens: int = 0  # scored tokens beyond the row
    longest: int = 0  # tokens of the longest record
    unscored: list[int] = field(default_factory=list)  # records without a scored token in their row
    #: locations of the first few of both kinds, by their index
    locations: dict[int, str] = field(default_factory=dict)
    digest: str = ""  # SHA-256 of all turns

    def add(self, row_length: int, whole: Fields, cut: Fields) -> None:
        """Counts the next record, given its fields before and after they are cut."""
        length = len(whole["tokens"])
        scored = _count_scored(whole)
        scored_in_row = _count_scored(cut)
        if not scored_in_row:
            self.unscored.append(self.records)
        if length > row_length:
            self.too_long.append(self.records)
            self.scored_tokens += scored
            self.lost_tokens += scored - scored_in_row
            self.longest = max(self.longest, length)

    def list_records(self, indices: Sequence[int]) -> str:
        """Returns the locations of the first few records, and the number of the others."""
        named = [self.locations[index] for index in indices[:NAMED_RECORDS]]
        more = len(indices) - len(named)
        return ", ".join(named) + (f" and {more} more" if more else "")

    def left_out(self, cfg: Experiment) -> set[int]:
        """Returns the records that are not trained on."""
        dropped = self.too_long if cfg.data.too_long == "drop" else []
        return {*dropped, *self.unscored}


def fit_rows(
    cfg: Experiment, tokenizer: Tokenizer, source: Conversations
) -> tuple[Conversations | Selection, Cuts]:
    """Returns the conversations to train on, and counts of those longer than a row.

    Raises:
      ConfigError: no conversation has a scored token, or one is too long and `data.too_long` is
        error.
    """
    cuts = count(cfg, tokenizer, source)
    if cfg.data.too_long == "error" and cuts.too_long:
        raise ConfigError(
            f"{_too_long(cfg, cuts)} (data.too_long error): {cuts.list_records(cuts.too_long)}. "
            f"{_sufficient(cfg, cuts)}"
        )
    left_out = cuts.left_out(cfg)
    if len(left_out) == cuts.records:
        fault = "has a scored token in its row"
        if cfg.data.too_long == "drop":
            fault = "fits a row (data.too_long drop)"
        message = (
            f"data.text_length {cfg.data.text_length} leaves nothing to learn from: none of the "
            f"{cuts.records} conversations {fault}. {_sufficient(cfg, cuts)}"
        )
        raise ConfigError(message.strip())
    if not left_out:
        return source, cuts
    return Selection(source, [i for i in range(cuts.records) if i not in left_out]), cuts


def count(cfg: Experiment, tokenizer: Tokenizer, source: Conversations) -> Cuts:
    """Counts over all conversations. Encodes only conversations that may be longer than a row."""
    cuts, digest = Cuts(), hashlib.sha256()
    count_tiles = packing.tile_counter(cfg, source)
    for conversation, max_tokens in _with_lengths(cfg, tokenizer, source):
        digest.update(repr(conversation.turns).encode())
        if max_tokens > cfg.row_length:
            tiles = [count_tiles(index) for index in conversation.images]
            whole = templates.encode(cfg, tokenizer, conversation.turns, tiles, conversation.system)
            cuts.add(cfg.row_length, whole, templates.cut(cfg, whole, tiles, cfg.row_length))
        cuts.records += 1
    for index in (*cuts.too_long[:NAMED_RECORDS], *cuts.unscored[:NAMED_RECORDS]):
        cuts.locations[index] = source.location(index)
    cuts.digest = digest.hexdigest()
    return cuts


def cut_message(cfg: Experiment, cuts: Cuts) -> str:
    """Returns a sentence about cut and omitted conversations; "" if none are."""
    if not cuts.too_long and not cuts.unscored:
        return ""
    message = _too_long(cfg, cuts)
    records = cuts.list_records(cuts.too_long)
    if cfg.data.too_long == "drop":
        message += f" and are left out with {cuts.scored_tokens} scored tokens: {records}."
    else:
        message += (
            f" and are cut: {cuts.lost_tokens} of their {cuts.scored_tokens} scored tokens are "
            f"lost ({records})."
        )
    unscored = [index for index in cuts.unscored if cfg.data.too_long == "truncate"]
    if unscored:
        records = cuts.list_records(unscored)
        message += f" {len(unscored)} have no scored token left and are left out: {records}."
    return f"{message} {_sufficient(cfg, cuts)}".strip()


def data_counts(cfg: Experiment, cuts: Cuts) -> dict[str, int]:
    """Returns what every row of metrics.jsonl says about the conversations that are too long."""
    is_dropping = cfg.data.too_long == "drop"
    left_out = cuts.left_out(cfg)
    return {
        "cut_conversations": len({*cuts.too_long} - left_out),
        "left_out_conversations": len(left_out),
        "lost_scored_tokens": cuts.scored_tokens if is_dropping else cuts.lost_tokens,
    }


def _with_lengths(
    cfg: Experiment, tokenizer: Tokenizer, source: Conversations
) -> Iterator[tuple[Conversation, int]]:
    """Yields each conversation and an upper bound on the number of its tokens."""
    title = "measuring conversations"
    with tqdm(total=len(source), desc=title, unit="record", disable=None) as bar:
        for start in range(0, len(source), CHUNK_RECORDS):
            end = min(start + CHUNK_RECORDS, len(source))
            chunk = [source[index] for index in range(start, end)]
            locate = functools.partial(_locate, source, start)
            counts = templates.max_token_counts(cfg, tokenizer, chunk, locate)
            yield from zip(chunk, counts, strict=True)
            bar.update(len(chunk))


def _locate(source: Conversations, start: int, number: int) -> str:
    return source.location(start + number)


def _count_scored(fields: Fields) -> int:
    return int(fields["loss_weights"].sum())


def _too_long(cfg: Experiment, cuts: Cuts) -> str:
    return (
        f"{len(cuts.too_long)} of {cuts.records} conversations are longer than a row "
        f"(data.text_length {cfg.data.text_length})"
    )


def _sufficient(cfg: Experiment, cuts: Cuts) -> str:
    """Returns a sentence with the data.text_length that cuts nothing; "" if nothing is cut."""
    if not cuts.too_long:
        return ""
    sufficient = cfg.data.text_length + cuts.longest - cfg.row_length
    return f"With data.text_length {sufficient} nothing is cut."
