"""The command `score`: scores of answers in a file."""

import json

from vlm_jax.cli.options import FILE, parse_options
from vlm_jax.config import ConfigError

SCORE = """examples:
  python run.py score --predictions answers.jsonl --metrics vqa_accuracy,anls
  python run.py score --predictions runs/mine/predictions.jsonl --metrics contains --per-example

Scores answers that were made here or elsewhere, and prints JSON. A line of the file is
  {"prediction": "2", "references": ["2", "two"], "type": "number"}
with "type" optional, and "choices", a list of texts, for multiple_choice.
docs/evaluation.md lists the metrics."""
SCORE_OPTIONS = {
    "predictions": {"required": True, "metavar": FILE, "help": "JSON Lines file of answers"},
    "metrics": {
        "default": "exact_match",
        "metavar": "A,B",
        "help": "metrics, separated by commas (default: exact_match)",
    },
    "per_example": {"action": "store_true", "help": "print the scores of each answer, too"},
}


def score(arguments: list[str]) -> int:
    """Prints the scores of the answers in a file as JSON."""
    args, _ = parse_options("score", arguments, SCORE_OPTIONS, SCORE)
    from vlm_jax.infer.metrics.predictions import read_predictions, score_predictions
    from vlm_jax.infer.metrics.table import check_metrics, of_answers

    metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
    check_metrics(metrics, "--metrics")
    of_model = [name for name in metrics if name not in of_answers(metrics)]
    if of_model:
        raise ConfigError(
            f"--metrics {of_model[0]} needs a model: python run.py eval --eval.metrics "
            f"{of_model[0]}."
        )
    numbers = score_predictions(metrics, read_predictions(args.predictions), args.per_example)
    print(json.dumps(numbers, indent=2))
    return 0
