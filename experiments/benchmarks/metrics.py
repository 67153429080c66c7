"""Seconds to score 10,000 answers with ten references each, by metric.

    python experiments/benchmarks/metrics.py [--answers 10000] [--json FILE]

Answers and references are short phrases, as in VQAv2; a third of the answers is right. `box_iou`,
`pope` and `multiple_choice` get answers in their form. `cider` is left out of the sum.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import report
from report import Result

sys.path.insert(0, str(Path(__file__).parents[2]))

REFERENCES, TURNS = 10, 5
SPECIAL = ("a", "the", "isn't", "two", "1,000", "dog,", "grass?", "3.5", "%", "yes", "no")
CHOICES = ("red", "blue", "green", "yellow")
APART = "cider"


def word(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(SPECIAL)
    return "".join(rng.choices("aeionrstl", k=rng.randint(2, 5)))


def phrase(rng: random.Random) -> str:
    return " ".join(word(rng) for _ in range(rng.randint(1, 4)))


def box(rng: random.Random) -> str:
    left, top = rng.random() / 2, rng.random() / 2
    return f"[{left:.2f}, {top:.2f}, {left + 0.4:.2f}, {top + 0.3:.2f}]"


# Metric -> an answer in its form; other metrics take phrases.
FORMS = {
    "box_iou": box,
    "pope": lambda rng: rng.choice(("yes", "No, there is none.")),
    "multiple_choice": lambda rng: rng.choice(("A", "(B)", "The answer is C.")),
}


def predictions(metric: str, count: int, seed: int):
    """Returns answers with references for a metric."""
    from vlm_jax.infer.metrics.predictions import Predictions, Reference

    rng, make = random.Random(seed), FORMS.get(metric, phrase)
    texts, references = [], []
    for _ in range(count):
        known = [make(rng) for _ in range(REFERENCES)]
        if metric == "pope":
            known = ["yes"]
        choices = CHOICES if metric == "multiple_choice" else ()
        if choices:
            known = ["B"]
        texts.append(rng.choice(known) if rng.random() < 1 / 3 else make(rng))
        references.append(Reference(known, "", None, choices))
    return Predictions(texts, references)


def seconds(metric: str, count: int) -> list[float]:
    """Returns the seconds of every turn, each with other answers; the first is not counted."""
    from vlm_jax.infer.metrics.predictions import score_predictions

    times = []
    for seed in range(TURNS + 1):
        answers = predictions(metric, count, seed)
        start = time.perf_counter()
        score_predictions([metric], answers)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=10_000)
    report.add_option(parser)
    options = parser.parse_args()

    from vlm_jax.infer.metrics.table import METRICS, of_answers

    times = {name: seconds(name, options.answers) for name in of_answers(METRICS)}
    together = [sum(turn) for turn in zip(*(x for name, x in times.items() if name != APART))]
    results = [Result.of(f"scoring: {name}", "s", x, min(x)) for name, x in times.items()]
    results.append(Result.of(f"scoring: all but {APART}", "s", together, min(together)))
    report.write(results, options.json)


if __name__ == "__main__":
    main()
