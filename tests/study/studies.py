"""Studies of the tiny model, and runs of them that were never made."""

import json
from dataclasses import replace
from pathlib import Path

from vlm_jax.config import Experiment
from vlm_jax.data import questions
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.study import Study, changed, planning
from vlm_jax.study.planning import Plan, Run
from vlm_jax.study.run import record
from vlm_jax.study.run.folder import Folder
from vlm_jax.testing import tiny

MEASURED = {
    **{
        "step_seconds": 0.1,
        "peak_memory_bytes": 2**30,
        "decoded_tokens_per_second": 5000.0,
        "data_sha256": "d0d0",
    },
    **{"devices": 1, "device_kind": "cpu", "processor": "a fast one", "cores": 2},
}


def base(datasets_dir: str) -> Experiment:
    """A tiny experiment on a few drawn pages."""
    return changed(
        tiny(),
        {
            **{
                "data.source": "glyphs",
                "data.images": (24, 4, 8),
                "data.dir": datasets_dir,
                "data.text_length": 96,
            },
            **{
                "decoder.max_positions": 160,
                "vision.image_size_px": 64,
                "vision.patch_size_px": 16,
            },
            **{
                "train.steps": 6,
                "train.checkpoint_every_steps": 3,
                "eval.max_examples": 16,
                "eval.batch_size": 16,
            },
            **{"eval.max_new_tokens": 4},
        },
    )


def study(datasets_dir: str, **fields) -> Study:
    """Two arms on two axes, in the second of which the mlp takes fewer steps."""
    settings = {
        "question": "Does the connector matter?",
        "base": base(datasets_dir),
        "arms": {"linear": {}, "shuffle": {"projector.kind": "pixel_shuffle"}},
        "matched": {"examples": "", "training_flops": "train.steps"},
        "reference": "linear",
        "tolerance": 0.1,
        "seeds": 2,
        "quick": {"train.steps": 2},
    }
    return Study(**settings | fields)


def pretend(run: Run, right: float) -> None:
    """Leaves in the work folder what a run leaves there of which a share of the answers is right."""
    workdir, cfg = Workdir(run.cfg.workdir), run.cfg
    workdir.open(cfg)
    asked = questions.to_evaluate(cfg)
    count = round(right * len(asked))
    lines = [
        {
            **{
                "image_id": one.image_id,
                "question": one.question,
                "type": one.type,
                "answer": one.answer,
            },
            **{"prediction": one.answer if i < count else "| <b>", "correct": i < count},
        }
        for i, one in enumerate(asked)
    ]
    workdir.predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = {
        line["type"]: [other["correct"] for other in lines if other["type"] == line["type"]]
        for line in lines
    }
    by_type = {kind: sum(found) / len(found) for kind, found in kinds.items()}
    scores = {
        "exact_match": count / len(asked),
        "by_type": by_type,
        "image_shuffled_exact_match": 0.0,
    }
    metrics = [
        {"step": i, "loss": 5.0 - 0.1 * i, "step_seconds": 0.1}
        for i in range(1, cfg.train.steps + 1)
    ]
    workdir.metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    workdir.eval.write_text(json.dumps(scores))
    record.add(cfg.workdir, ["python", "run.py", cfg.workdir], 60.0, 0, record.environment())


def pretended(study: Study, folder: Path) -> Plan:
    """A study whose runs, all but the last, are pretended."""
    plan = planning.plan(study, folder, False, {})
    place = Folder(folder)
    place.open(plan)
    for i, run in enumerate(plan.runs()[:-1]):
        pretend(run, 0.5 + 0.25 * (run.arm == "shuffle") + 0.0625 * (i % 2))
    for name in plan.models():
        place.measurement(name).write_text(json.dumps(MEASURED))
    return plan


def with_cache(made: Study, folder: str) -> Study:
    """The study, its programs compiled once for all of its runs."""
    return replace(made, base=changed(made.base, {"train.compilation_cache_dir": folder}))
