"""The table of metrics: a function and a row each."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_jax.config import ConfigError
from vlm_jax.config.hints import nearest
from vlm_jax.infer.metrics import answers, captions, choices, grounding, loss, vqa
from vlm_jax.infer.metrics.intervals import Bounds, Estimate, estimate_mean
from vlm_jax.runtime.packages import check_installed

EXTRA = "requirements-eval.txt"


@dataclass(frozen=True)
class Metric:
    """A rule that scores generated answers, or what a model computes of the right ones."""

    #: (prediction, references) -> the score of an answer
    function: Callable[..., Any]
    #: a sentence: the rule, and what other programs do differently
    variant: str
    #: the paper, and the program whose scores it has
    source: str
    bounds: Bounds = (0.0, 1.0)
    #: `function` takes the choices of the question, too
    takes_choices: bool = False
    #: `function` takes all predictions and all references, and returns the score of each answer
    takes_all: bool = False
    #: values of `function` -> numbers by name, "" the metric itself; None: the mean of the values
    summarize: Callable[[Sequence[Any]], Mapping[str, Estimate]] | None = None
    #: the other names that `summarize` returns
    parts: tuple[str, ...] = ()
    #: value of `function` -> score of the answer; None: an answer alone has no score
    score_answer: Callable[[Any], float] | None = lambda value: value
    #: package of requirements-eval.txt that `function` imports
    package: str = ""
    #: `function` takes the `grounding.Attention` of a question instead, which only a model has;
    #: questions without an object have no value
    of_attention: bool = False
    #: `function` takes the `loss.AnswerLoss` of a question instead
    of_loss: bool = False
    higher_is_better: bool = True

    def summary(self, values: Sequence[Any]) -> Mapping[str, Estimate]:
        """Returns the numbers of many answers, with 95 % intervals, by name.

        `values` may hold None, for questions that the metric does not apply to.
        """
        values = [value for value in values if value is not None]
        if self.summarize:
            return self.summarize(values)
        return {"": estimate_mean(values, self.bounds)}


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        answers.exact_match,
        variant="equal to a reference, character by character",
        source="SQuAD's exact match (Rajpurkar et al. 2016) without its normalization",
    ),
    "contains": Metric(
        answers.contains,
        variant="a reference occurs in the answer, ignoring case",
        source="OCRBench (Liu et al. 2023), lmms-eval tasks/ocrbench/utils.py",
    ),
    "vqa_accuracy": Metric(
        vqa.vqa_accuracy,
        variant="mean over the references, each left out, of min(1, matches / 3); normalized "
        "only if the references differ (lmms-eval: always); below 4 references none reaches 1",
        source="VQAv2 (Goyal et al. 2017), GT-Vision-Lab/VQA vqaEval.py",
    ),
    "text_vqa": Metric(
        vqa.text_vqa,
        variant="vqa_accuracy after EvalAI's processor, always normalized; below 4 references "
        "none reaches 1",
        source="TextVQA (Singh et al. 2019), lmms-eval tasks/textvqa/utils.py",
    ),
    "anls": Metric(
        answers.anls,
        variant="best reference, ignoring case; a similarity of exactly 0.5 counts (big_vision: 0)",
        source="ST-VQA (Biten et al. 2019), lmms-eval api/metrics.py",
    ),
    "relaxed_accuracy": Metric(
        answers.relaxed_accuracy,
        variant="numbers within 5 % of a reference, N% as N / 100; texts equal, ignoring case",
        source="ChartQA (Masry et al. 2022), lmms-eval tasks/chartqa/utils.py",
    ),
    "pope": Metric(
        choices.pope,
        variant="accuracy; no if the first sentence has No, not or no, else yes; the share of yes "
        "is that of the answers (lmms-eval: of the references)",
        source="POPE (Li et al. 2023), AoiDragon/POPE evaluate.py",
        summarize=choices.pope_rates,
        parts=("precision", "recall", "f1", "yes_share"),
        score_answer=lambda value: value.is_right,
    ),
    "multiple_choice": Metric(
        choices.multiple_choice,
        variant="letter parsed as by MMMU; without a letter the answer is wrong (MMMU: a random "
        "letter)",
        source="MMMU (Yue et al. 2024), lmms-eval _task_utils/mmmu_mcq_utils.py",
        takes_choices=True,
    ),
    "box_iou": Metric(
        answers.box_iou,
        variant="share of answers whose first [left, top, right, bottom] has IoU >= 0.5",
        source="RefCOCO (Yu et al. 2016), lmms-eval tasks/refcoco/utils_rec.py",
    ),
    "cider": Metric(
        captions.cider,
        variant="CIDEr-D from 0 to 10, sigma 6; own tokenizer in place of Stanford's in Java",
        source="CIDEr (Vedantam et al. 2015), pycocoevalcap cider/cider_scorer.py",
        bounds=(0.0, captions.CIDER_SCALE),
        takes_all=True,
    ),
    "bleu": Metric(
        captions.bleu,
        variant="BLEU-4 of all answers together from 0 to 100, tokenizer 13a, smoothing exp",
        source="BLEU (Papineni et al. 2002), sacrebleu (Post 2018)",
        bounds=(0.0, 100.0),
        summarize=captions.corpus_bleu,
        score_answer=None,
        package="sacrebleu",
    ),
    "rouge_l": Metric(
        captions.rouge_l,
        variant="F measure with the best reference, without stemming; only Latin letters count",
        source="ROUGE (Lin 2004), rouge-score rouge_scorer.py",
    ),
    "grounding": Metric(
        grounding.score,
        variant="share of the attention to the image that is on the object asked about, mean over "
        "heads, layers and the tokens of the right answer",
        source="pointing game of Zhang et al. 2018 (Excitation Backprop), on patches",
        summarize=grounding.summarize,
        parts=grounding.PARTS,
        score_answer=None,
        of_attention=True,
    ),
    "nats": Metric(
        lambda value: value,
        variant="mean cross-entropy of the tokens of the right answer, its end token included; "
        "all questions, or all of one type, are one text",
        source="the loss of the training; perplexity is its exponential",
        bounds=(0.0, math.inf),
        summarize=loss.summarize,
        score_answer=None,
        of_loss=True,
        higher_is_better=False,
    ),
}


def of_answers(metrics: Iterable[str]) -> list[str]:
    """Returns the metrics that need no more than the answers."""
    return [name for name in metrics if not (METRICS[name].of_attention or METRICS[name].of_loss)]


def of_attention(metrics: Iterable[str]) -> list[str]:
    """Returns the metrics that need the attention of the model."""
    return [name for name in metrics if METRICS[name].of_attention]


def of_loss(metrics: Iterable[str]) -> list[str]:
    """Returns the metrics that need the loss of the right answers."""
    return [name for name in metrics if METRICS[name].of_loss]


def check_metrics(names: Iterable[str], where: str) -> None:
    """Checks the names of metrics; `where` names them in a message.

    Raises:
      ConfigError: a name has no row in METRICS or is repeated, or the package of a metric is not
        installed.
    """
    names = list(names)
    if not names:
        raise ConfigError(f"{where} is empty: choose from {', '.join(METRICS)}.")
    for i, name in enumerate(names):
        if name not in METRICS:
            hint = nearest(name, METRICS)
            raise ConfigError(
                f"{where} {name!r} is not a metric{hint}: choose from {', '.join(METRICS)}."
            )
        if name in names[:i]:
            raise ConfigError(f"{where} names {name} twice: leave one out.")
        package = METRICS[name].package
        if package:
            check_installed(package, f"{where} {name}", EXTRA)
