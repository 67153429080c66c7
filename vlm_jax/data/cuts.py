"""Counts, before training, what the length of a row cuts from conversations."""

import hashlib
from collections.abc import Iterator
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
    cut_records: int = 0  # longer than a row
    scored_tokens: int = 0  # of the cut records
    lost_tokens: int = 0  # scored tokens beyond the row
    longest: int = 0  # tokens of the longest cut record
    unscored: list[int] = field(default_factory=list)  # records without a scored token in their row
    named: list[str] = field(default_factory=list)  # locations of the first few of those
    digest: str = ""  # SHA-256 of all turns

    def add(self, row_length: int, whole: Fields, cut: Fields) -> None:
        """Counts the next record, given its fields before and after they are cut."""
        length = len(whole["tokens"])
        scored = _count_scored(whole)
        scored_in_row = _count_scored(cut)
        if not scored_in_row:
            self.unscored.append(self.records)
        if length > row_length:
            self.cut_records += 1
            self.scored_tokens += scored
            self.lost_tokens += scored - scored_in_row
            self.longest = max(self.longest, length)


def drop_unscored(
    cfg: Experiment, tokenizer: Tokenizer, source: Conversations
) -> tuple[Conversations | Selection, Cuts]:
    """Returns the conversations that have a scored token in their row, and counts of the cuts.

    Raises:
      ConfigError: no conversation has a scored token.
    """
    cuts = count(cfg, tokenizer, source)
    if len(cuts.unscored) == cuts.records:
        message = (
            f"data.text_length {cfg.data.text_length} leaves nothing to learn from: none of the "
            f"{cuts.records} conversations has a scored token in its row. {_sufficient(cfg, cuts)}"
        )
        raise ConfigError(message.strip())
    if not cuts.unscored:
        return source, cuts
    unscored = set(cuts.unscored)
    scored = [index for index in range(cuts.records) if index not in unscored]
    return Selection(source, scored), cuts


def count(cfg: Experiment, tokenizer: Tokenizer, source: Conversations) -> Cuts:
    """Counts over all conversations. Encodes only conversations that may be longer than a row."""
    cuts, digest = Cuts(), hashlib.sha256()
    count_tiles = packing.tile_counter(cfg, source)
    for conversation, max_tokens in _with_lengths(cfg, tokenizer, source):
        digest.update(repr(conversation.turns).encode())
        if max_tokens > cfg.row_length:
            tiles = [count_tiles(index) for index in conversation.images]
            whole = templates.encode(cfg, tokenizer, conversation.turns, tiles)
            cuts.add(cfg.row_length, whole, templates.cut(cfg, whole, tiles, cfg.row_length))
        cuts.records += 1
    cuts.named = [source.location(index) for index in cuts.unscored[:NAMED_RECORDS]]
    cuts.digest = digest.hexdigest()
    return cuts


def cut_message(cfg: Experiment, cuts: Cuts) -> str:
    """Returns a sentence about cut and omitted conversations; "" if none are."""
    if not cuts.cut_records and not cuts.unscored:
        return ""
    message = (
        f"{cuts.cut_records} of {cuts.records} conversations are longer than a row "
        f"(data.text_length {cfg.data.text_length}) and are cut: {cuts.lost_tokens} of their "
        f"{cuts.scored_tokens} scored tokens are lost."
    )
    if cuts.unscored:
        more = len(cuts.unscored) - len(cuts.named)
        records = ", ".join(cuts.named)
        if more:
            records += f" and {more} more"
        message += f" {len(cuts.unscored)} have no scored token left and are left out: {records}."
    return f"{message} {_sufficient(cfg, cuts)}".strip()


def _with_lengths(
    cfg: Experiment, tokenizer: Tokenizer, source: Conversations
) -> Iterator[tuple[Conversation, int]]:
    """Yields each conversation and an upper bound on the number of its tokens."""
    title = "measuring conversations"
    with tqdm(total=len(source), desc=title, unit="record", disable=None) as bar:
        for start in range(0, len(source), CHUNK_RECORDS):
            end = min(start + CHUNK_RECORDS, len(source))
            chunk = [source[index] for index in range(start, end)]
            turns = [conversation.turns for conversation in chunk]
            yield from zip(chunk, templates.max_token_counts(cfg, tokenizer, turns), strict=True)
            bar.update(len(chunk))


def _count_scored(fields: Fields) -> int:
    return int(fields["loss_weights"].sum())


def _sufficient(cfg: Experiment, cuts: Cuts) -> str:
    """Returns a sentence with the data.text_length that cuts nothing; "" if nothing is cut."""
    if not cuts.cut_records:
        return ""
    sufficient = cfg.data.text_length + cuts.longest - cfg.row_length
    return f"With data.text_length {sufficient} nothing is cut."
