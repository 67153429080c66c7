"""Studies of the tiny model, and folders of studies whose runs were never trained."""

import json
from pathlib import Path

from vlm_jax.config import Experiment
from vlm_jax.data import questions
from vlm_jax.infer import evaluate
from vlm_jax.infer.metrics.scores import evaluate_metrics
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study import Contrast, Study, override, planning
from vlm_jax.study.planning import Plan, Run
from vlm_jax.study.run import record
from vlm_jax.study.run.folder import Folder
from vlm_jax.testing import tiny

__all__ = ["Contrast", "override"]  # for study files of tests

MEASUREMENT = {
    "step_seconds": 0.1,
    "peak_memory_bytes": 2**30,
    "decoded_tokens_per_second": 5000.0,
    "data_sha256": "d0d0",
    "devices": 1,
    "device_kind": "cpu",
    "processor": "a fast one",
    "cores": 2,
}


def base(datasets_dir: str) -> Experiment:
    """A tiny experiment on a few drawn pages."""
    fields = {
        "data.source": "glyphs",
        "data.images": (24, 4, 8),
        "data.dir": datasets_dir,
        "data.text_length": 96,
        "decoder.max_positions": 160,
        "vision.image_size_px": 64,
        "vision.patch_size_px": 16,
        "train.steps": 6,
        "train.checkpoint_every_steps": 3,
        "eval.max_examples": 16,
        "eval.batch_size": 16,
        "eval.max_new_tokens": 4,
    }
    return override(tiny(), fields)


def study(datasets_dir: str, **fields) -> Study:
    """Two arms on two axes; at matched FLOPs, `shuffle` takes more steps."""
    settings = {
        "question": "Does the connector matter?",
        "base": base(datasets_dir),
        "arms": {"linear": {}, "shuffle": {"projector.kind": "pixel_shuffle"}},
        "matched": {"examples": None, "training_flops": "train.steps"},
        "reference": "linear",
        "tolerance": 0.1,
        "seeds": 2,
        "quick": {"train.steps": 2},
    }
    return Study(**settings | fields)


def write_run(run: Run, correct_share: float, seconds: float = 60.0) -> None:
    """Writes the files of a run that took `seconds`, with this share of correct answers."""
    workdir, cfg = Workdir(run.cfg.workdir), run.cfg
    workdir.open(cfg)
    test_questions = questions.to_evaluate(cfg)
    metrics = cfg.eval.metrics
    correct_count = round(correct_share * len(test_questions))
    predictions = [question.answer for question in test_questions[:correct_count]]
    predictions += ["| <b>"] * (len(test_questions) - correct_count)
    right = evaluate.references(test_questions)
    values = evaluate_metrics(metrics, predictions, right)
    shuffled_values = evaluate_metrics(metrics, [""] * len(right), right)
    workdir.predictions.write_text(evaluate.prediction_lines(test_questions, predictions, values))
    scores = evaluate.score(right, values, shuffled_values)
    workdir.eval.write_text(json.dumps(scores))

    metrics = [
        {"step": i, "loss": 5.0 - 0.1 * i, "step_seconds": 0.1}
        for i in range(1, cfg.train.steps + 1)
    ]
    metrics.append({"step": cfg.train.steps, "val/loss": 1.0, "validation_seconds": 0.1})
    workdir.metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    command = ["python", "run.py", cfg.workdir]
    record.add_attempt(cfg.workdir, command, seconds, 0, record.environment())


def write_study(study: Study, path: Path) -> Plan:
    """Writes the folder of a study in which all runs but the last are finished."""
    plan = planning.build_plan(study, path, False, {})
    folder = Folder(path)
    folder.open(plan)
    for i, run in enumerate(plan.runs()[:-1]):
        gain = 0.25 if run.arm == "shuffle" else 0.0
        write_run(run, 0.5 + gain + 0.0625 * (i % 2))
    for name in plan.models():
        folder.measurement(name).write_text(json.dumps(MEASUREMENT))
    return plan
