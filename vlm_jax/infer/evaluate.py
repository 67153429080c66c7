"""Exact match of generated answers, with the right images and with those of other examples."""

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from vlm_jax import axes, sharding
from vlm_jax.config import Experiment
from vlm_jax.data import questions
from vlm_jax.data.questions import Question
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.generate import NonFiniteLogits, SamplingParams, generate
from vlm_jax.infer.samples import draw_samples
from vlm_jax.runtime import distributed
from vlm_jax.runtime.workdir import EvaluationFolder, Workdir, write_atomic

SCORES = ("exact_match", "image_shuffled_exact_match")  # in eval.json, beside `by_type`


def evaluate(
    cfg: Experiment,
    params,
    tokenizer: Tokenizer,
    step: int | None = None,
    folder: EvaluationFolder | None = None,
) -> dict:
    """Answers the questions of `eval.split` or `eval.files`, on all processes together, and returns the scores.

    The first process writes eval.json, predictions.jsonl and samples.png to `folder`, by default the run's work folder.
    `step` is the step of the checkpoint, for eval.json.

    `exact_match` is the share of answers equal to the expected text; `image_shuffled_exact_match` the same where every
    question is asked about the image of another.

    Raises:
      ConfigError: the work folder cannot be written, the split does not exist, or an answer has no room.
      NonFiniteLogits: the model computes NaN for a question; nothing is written then.
    """
    folder = folder or Workdir(cfg.workdir)
    with distributed.raise_on_all():
        if not jax.process_index():
            folder.check_writable()
    asked = questions.to_evaluate(cfg)
    if not jax.process_index() and (said := too_long(cfg, tokenizer, asked)):
        print(said, flush=True)
    shown = {"evaluating": asked, "with shuffled images": shuffle_images(asked)}
    answers, blind = answer(cfg, params, tokenizer, asked, shown)
    scores = {
        "split": cfg.eval.read_split,
        "files": list(cfg.eval_data.files),
        "examples": len(asked),
        "step": step,
        "max_new_tokens": cfg.eval.max_new_tokens,
        "exact_match": _share(asked, answers),
        "by_type": _by_type(asked, answers),
        "image_shuffled_exact_match": _share(asked, blind),
    }
    if jax.process_index():
        return scores
    folder.keep_settings()
    write_atomic(folder.predictions, "".join(_line(*pair) for pair in zip(asked, answers)))
    draw_samples(folder.samples, asked, answers, cfg.eval.title)
    write_atomic(folder.eval, json.dumps(scores, indent=2) + "\n")
    return scores


def too_long(cfg: Experiment, tokenizer: Tokenizer, asked: list[Question]) -> str:
    """A sentence about the answers that have no room in what is generated; "" where all have."""
    most = cfg.eval.max_new_tokens
    lengths = [len(tokenizer.encode(question.answer)) for question in asked]
    cut = sum(length > most for length in lengths)
    if not cut:
        return ""
    return (
        f"{cut} of {len(asked)} answers are longer than eval.max_new_tokens {most} and cannot be reached: the longest "
        f"has {max(lengths)} tokens."
    )


def shuffle_images(asked: list[Question]) -> list[Question]:
    """For every question another with as many images: the one half of these away, for others ask about its image."""
    shown = list(asked)
    for count in {question.image_count for question in asked}:
        alike = [i for i, question in enumerate(asked) if question.image_count == count]
        half = len(alike) // 2
        for i, other in zip(alike, alike[half:] + alike[:half]):
            shown[i] = asked[other]
    return shown


def answer(
    cfg: Experiment,
    params,
    tokenizer: Tokenizer,
    asked: list[Question],
    shown: Mapping[str, list[Question]],
) -> list[list[str]]:
    """For each of the labelled lists `shown`: one generated answer a question, about the images of the one there.

    All batches are of one shape, which is compiled once.
    """
    mesh, size = axes.make_mesh(cfg.mesh), cfg.eval.batch_size
    starts = range(0, len(asked), size)
    batches = [[min(i, len(asked) - 1) for i in range(start, start + size)] for start in starts]
    most = max(
        len({those[i].images for i in chosen}) for those in shown.values() for chosen in batches
    )
    shape = questions.row_length(cfg, tokenizer, asked), axes.round_up_to_shards(most, mesh)

    def ask(chosen: list[int], those: list[Question]) -> list[str]:
        pairs = [[rows[i] for i in chosen] for rows in (asked, those)]
        batch = questions.question_batch(cfg, tokenizer, *pairs, *shape)
        try:
            with jax.set_mesh(mesh):
                made = generate(
                    cfg.model,
                    params,
                    sharding.place_rows(batch, mesh),
                    cfg.eval.max_new_tokens,
                    how,
                )
        except NonFiniteLogits as error:
            raise error.about(asked[chosen[error.row]].question) from None
        made = multihost_utils.process_allgather(made, tiled=True)
        return [tokenizer.decode(ids).strip() for ids in made]  # a template may begin with a space

    how, answers = SamplingParams(eos=(cfg.data.eos_id,)), []
    for label, those in shown.items():
        if not sys.stderr.isatty():  # where there is no bar
            print(f"{label}: {len(asked)} questions", flush=True)
        given = [
            ask(chosen, those) for chosen in tqdm(batches, desc=label, unit="batch", disable=None)
        ]
        answers.append(list(itertools.chain(*given))[: len(asked)])
    return answers


def _share(asked: list[Question], answers: list[str]) -> float:
    return sum(q.answer == a for q, a in zip(asked, answers)) / len(asked)


def _by_type(asked: list[Question], answers: list[str]) -> dict[str, float]:
    right = defaultdict(list)
    for question, given in zip(asked, answers):
        right[question.type].append(question.answer == given)
    return {kind: sum(found) / len(found) for kind, found in sorted(right.items())}


def _line(question: Question, given: str) -> str:
    row = {name: getattr(question, name) for name in ("image_id", "question", "type", "answer")}
    return json.dumps({**row, "prediction": given, "correct": given == question.answer}) + "\n"
