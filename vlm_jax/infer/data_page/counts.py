"""Counts of a training split: examples, turns, images, tokens, and what does not fit a row."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vlm_jax.config import Experiment
from vlm_jax.data import length_check, pipeline
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.data_page.examples import Example

BINS = 10
BAR_CHARACTERS = 40


@dataclass(frozen=True)
class Bin:
    """Number of examples with `first` to `last` tokens."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Counts:
    """Name -> value lines, the histogram of token lengths, and a sentence about what is cut."""

    lines: dict[str, str]
    histogram: list[Bin]
    cut_message: str


def count(cfg: Experiment, tokenizer: Tokenizer, examples: Iterable[Example]) -> Counts:
    """Counts all examples of a training split."""
    turns, images, lengths, scored = [], [], [], []
    tokens_of_source = Counter()
    for example in examples:
        tokens_of_source[example.source] += len(example.tokens)
        turns.append(example.turns)
        images.append(len(example.images))
        lengths.append(len(example.tokens))
        scored.append(int(example.is_scored.sum()))
    is_conversations = cfg.data.is_conversations
    name = "conversation" if is_conversations else "row of questions"
    lines = {
        "dataset": describe_dataset(cfg),
        "examples": f"{len(lengths):,}, each a {name}",
        "turns": _describe(turns),
        "images": _describe_counts(images),
        "tokens": _describe(lengths),
        "scored tokens": f"{_describe(scored)}; {sum(scored) / max(sum(lengths), 1):.1%} of all",
        "row": f"{cfg.row_length:,} slots",
    }
    for source, (examples_of_source, share) in pipeline.mixture_counts(cfg, tokenizer).items():
        lines[f"source {source}"] = (
            f"{examples_of_source:,} examples, {tokens_of_source[source]:,} tokens; {share:.1%} of "
            "the examples of the training"
        )
    numbers = pipeline.data_counts(cfg, tokenizer)
    if numbers:
        lines["cut"] = f"{numbers['cut_conversations']:,} conversations"
        lines["left out"] = f"{numbers['left_out_conversations']:,} conversations"
        lines["lost"] = f"{numbers['lost_scored_tokens']:,} scored tokens"
    message = length_check.dropped_questions_message(cfg, tokenizer)
    return Counts(lines, histogram(lengths), message)


def describe_dataset(cfg: Experiment) -> str:
    """Names the dataset and split of an experiment, or of each source of its mixture."""
    names = []
    for name, data in cfg.data.parts.items():
        dataset = f"{data.source} {data.train_split}"
        names.append(f"{name}: {dataset}" if name else dataset)
    return ", ".join(names)


def histogram(lengths: list[int]) -> list[Bin]:
    """Returns at most `BINS` bins of equal width that hold all lengths."""
    shortest, longest = min(lengths), max(lengths)
    width = -(-(longest - shortest + 1) // BINS)
    counts = Counter((length - shortest) // width for length in lengths)
    bins = []
    for number in range((longest - shortest) // width + 1):
        first = shortest + number * width
        bins.append(Bin(first, first + width - 1, counts[number]))
    return bins


def format_counts(counts: Counts) -> str:
    """Returns the counts as aligned lines for a terminal."""
    width = max(map(len, counts.lines))
    lines = [f"{name:{width}}  {value}" for name, value in counts.lines.items()]
    lines.append("tokens of an example:")
    most = max(each.count for each in counts.histogram)
    digits = len(f"{counts.histogram[-1].last:,}")
    for each in counts.histogram:
        bar = "#" * -(-each.count * BAR_CHARACTERS // most)
        span = f"{each.first:{digits},} to {each.last:{digits},}"
        lines.append(f"  {span}  {each.count:>9,}  {bar}".rstrip())
    if counts.cut_message:
        lines.append(counts.cut_message)
    return "\n".join(lines)


def _describe(values: list[int]) -> str:
    return (
        f"{sum(values):,}; in an example {min(values):,} to {max(values):,}, "
        f"mean {np.mean(values):,.1f}"
    )


def _describe_counts(values: list[int]) -> str:
    counts = sorted(Counter(values).items())
    parts = [f"{number} in {examples:,}" for number, examples in counts[:BINS]]
    if len(counts) > BINS:
        parts.append(f"up to {counts[-1][0]}")
    return f"{sum(values):,}; {', '.join(parts)} examples"
