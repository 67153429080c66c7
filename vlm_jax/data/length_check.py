"""What fits into the rows, told before the training: a mistake must not show in the midst of it."""

import numpy as np

from vlm_jax.config import Experiment
from vlm_jax.data import (
    cuts,
    pipeline,
    questions,
    sources,
    text,
)
from vlm_jax.data.tokenizer import Tokenizer

SAMPLED_ROWS = 500  # of training, from which it is told how many questions do not fit


def check_lengths(cfg: Experiment, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where a question to learn from or to evaluate does not fit.

    Conversations are cut to fit (`data/cuts.py`).
    """
    if not cfg.data.is_conversations:
        text.pack_row(cfg, [longest_pair(cfg, tokenizer)])
    if cfg.eval.read_split:
        questions.row_length(cfg, tokenizer, questions.to_evaluate(cfg))


def dropped_questions_message(cfg: Experiment, tokenizer: Tokenizer) -> str:
    """A sentence about what does not fit into the training rows; "" where all does.

    Of conversations all are counted, of other datasets the questions of `sampled_rows`.
    """
    if cfg.data.is_conversations:
        return cuts.cut_message(cfg, pipeline.training_conversations(cfg, tokenizer)[1])
    rows = sampled_rows(cfg, tokenizer)
    asked = sum(map(len, rows))
    left = asked - sum(len(text.drop_overflow(cfg, row)) for row in rows)
    if not left:
        return ""
    longest = max(sum(len(part) for pair in row for part in pair) for row in rows)
    return (
        f"{left} of {asked} questions in {len(rows)} training rows ({left / asked:.1%}) do not fit data.text_length "
        f"{cfg.data.text_length} and are left out. Every epoch draws other questions for a row, so none is lost for "
        f"good; rows of {longest} tokens would fit all of these, and make every step slower."
    )


def sampled_rows(cfg: Experiment, tokenizer: Tokenizer) -> list[list[text.Pair]]:
    """What is chosen for at most `SAMPLED_ROWS` training rows, spread over the split, whether it fits or not."""
    records = sources.load(cfg.data, cfg.data.train_split)
    choose, rng = pipeline.make_question_sampler(cfg, tokenizer), np.random.default_rng(cfg.seed)
    return [
        choose(records[index], rng)
        for index in range(0, len(records), -(-len(records) // SAMPLED_ROWS))
    ]


def longest_pair(cfg: Experiment, tokenizer: Tokenizer) -> text.Pair:
    """The question of the training split that takes the most tokens with its answer."""
    records = sources.load(cfg.data, cfg.data.train_split)
    pairs = {pair for record in records for pair in zip(record.questions, record.answers)}
    encoded = (
        (text.prompt_ids(tokenizer, asked), text.answer_ids(tokenizer, said))
        for asked, said in pairs
    )
    return max(encoded, key=lambda pair: len(pair[0]) + len(pair[1]))
