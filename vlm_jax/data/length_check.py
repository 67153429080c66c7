"""Checks, before training, that all questions fit the configured row length."""

import numpy as np

from vlm_jax.config import Experiment, naming_source
from vlm_jax.data import (
    cuts,
    pipeline,
    questions,
    sources,
    text,
)
from vlm_jax.data.tokenizer import Tokenizer

SAMPLED_ROWS = 500  # training rows from which the share of dropped questions is estimated


def check_lengths(cfg: Experiment, tokenizer: Tokenizer) -> None:
    """Checks that every question of training and evaluation fits an otherwise empty row.

    Conversations are not checked: they are cut to fit (`data/cuts.py`).

    Raises:
      ConfigError: a question does not fit.
    """
    if not cfg.data.is_conversations:
        for name, part in cfg.parts.items():
            with naming_source(name):
                text.pack_row(part, [longest_pair(part, tokenizer)])
    if cfg.eval.read_split:
        questions.row_length(cfg, tokenizer, questions.to_evaluate(cfg))


def dropped_questions_message(cfg: Experiment, tokenizer: Tokenizer) -> str:
    """Returns a sentence about what does not fit the training rows; "" if everything does.

    All conversations are counted; of other datasets the questions of `sampled_rows`. Of a mixture
    it is a sentence for each source.
    """
    messages = {name: _dropped_message(part, tokenizer) for name, part in cfg.parts.items()}
    return " ".join(
        f"data.mixture {name}: {message}" if name else message
        for name, message in messages.items()
        if message
    )


def _dropped_message(cfg: Experiment, tokenizer: Tokenizer) -> str:
    if cfg.data.is_conversations:
        return cuts.cut_message(cfg, pipeline.training_conversations(cfg, tokenizer)[1])
    rows = sampled_rows(cfg, tokenizer)
    count = sum(map(len, rows))
    dropped = count - sum(len(text.drop_overflow(cfg, row)) for row in rows)
    if not dropped:
        return ""
    longest = max(map(_row_tokens, rows))
    return (
        f"{dropped} of {count} questions in {len(rows)} training rows ({dropped / count:.1%}) do "
        f"not fit data.text_length {cfg.data.text_length} and are left out. Every epoch draws "
        "other questions for a row, so none is lost for good; rows of "
        f"{longest} tokens would fit all of these, but make every step slower."
    )


def sampled_rows(cfg: Experiment, tokenizer: Tokenizer) -> list[list[text.Pair]]:
    """Returns the questions of at most `SAMPLED_ROWS` training rows, spread over the split.

    They are returned whether they fit the row or not.
    """
    records = sources.load(cfg.data, cfg.data.train_split)
    sample = pipeline.make_question_sampler(cfg, tokenizer)
    rng = np.random.default_rng(cfg.seed)
    step = -(-len(records) // SAMPLED_ROWS)
    return [sample(records[index], rng) for index in range(0, len(records), step)]


def longest_pair(cfg: Experiment, tokenizer: Tokenizer) -> text.Pair:
    """Returns the question of the training split that has the most tokens with its answer."""
    pairs = set()
    for record in sources.load(cfg.data, cfg.data.train_split):
        pairs.update(zip(record.questions, record.answers, strict=True))
    encoded = (text.encode_pair(tokenizer, *pair) for pair in pairs)
    return max(encoded, key=_pair_tokens)


def _pair_tokens(pair: text.Pair) -> int:
    prompt, answer = pair
    return len(prompt) + len(answer)


def _row_tokens(row: list[text.Pair]) -> int:
    return sum(map(_pair_tokens, row))
