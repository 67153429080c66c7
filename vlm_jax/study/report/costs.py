"""The sections of a report about what it costs, and how to come by it again."""

import dataclasses
import hashlib
import json
import shlex

from vlm_jax.config import Experiment, Fusion
from vlm_jax.cost.chips import GIB
from vlm_jax.cost.flops import token_flow
from vlm_jax.plan import document, memory
from vlm_jax.study.planning import Plan
from vlm_jax.study.report.page import Cell, Section, Table
from vlm_jax.study.report.results import Results
from vlm_jax.study.report.scores import number
from vlm_jax.study.run import record
from vlm_jax.study.run.folder import (
    Folder,
    as_json,
    default_folder,
    definition,
    differences,
)


def cost_section(results: Results) -> Section:
    """Every model that was run, an arm at its own size first."""
    plan, place = results.plan, Folder(results.plan.folder)
    rows = [
        _row(name, plan.built(cfg), place.read_measurement(name))
        for name, cfg in plan.models().items()
    ]
    columns = [
        *(
            "model",
            "parameters",
            "trained",
            "MFLOP forward",
            "MFLOP backward",
            "tokens in a row",
            "image tokens",
        ),
        *("cache of an image, KiB", "peak memory, GiB", "examples/s", "decoded tokens/s"),
    ]
    text = (
        "An example is a row of training: an image with the questions that share it, padding included, or packed "
        "conversations. FLOPs are of one example. The last three columns are measured by a short run: peak memory of "
        "the training process (of a device where it says so), examples of the fastest step, and tokens that are "
        "decoded for 32 questions at once."
    )
    return Section("Cost", [text], tables=[Table(columns, rows)])


def _row(name: str, cfg: Experiment, measured: dict | None) -> list[Cell]:
    parts, tokens, rows = document.parts(cfg).values(), token_flow(cfg), cfg.train.batch_size
    forward, backward = (
        sum(part[f"{way}_flops"] for part in parts) / rows for way in ("forward", "backward")
    )
    numbers = [
        f"{sum(part['parameters'] for part in parts):,}",
        f"{sum(part['parameters'] for part in parts if part['trained']):,}",
        f"{forward / 1e6:,.1f}",
        f"{backward / 1e6:,.1f}",
        f"{tokens.sequence:,}",
        f"{tokens.projected:,}",
        f"{image_cache_bytes(cfg) / 1024:,.1f}",
    ]
    speeds = ["-"] * 3
    if measured:
        decoded, peak = measured["decoded_tokens_per_second"], measured["peak_memory_bytes"] / GIB
        speeds = [f"{peak:.2f}", f"{rows / measured['step_seconds']:,.0f}", f"{decoded:,.0f}"]
    return [Cell(name), *map(number, numbers + speeds)]


def image_cache_bytes(cfg: Experiment) -> int:
    """Keys and values that are kept of the images of a row while an answer is decoded, in float32."""
    blind = dataclasses.replace(cfg, fusion=Fusion(kind="text_only"))
    return memory.cache_bytes(cfg) - memory.cache_bytes(blind)


def difference_section(results: Results) -> Section:
    """In what every arm differs from the reference, the numbers that were solved for included."""
    plan, rows = results.plan, []
    for (axis, arm), cfg in plan.arms.items():
        reference = as_json(plan.arms[axis, plan.study.reference])
        lines = differences(reference, as_json(cfg))
        rows.append([Cell(axis), Cell(arm), Cell("; ".join(lines) or "nothing")])
    text = (
        f"Every field in which an arm differs from {plan.study.reference}, matched fields included; "
        "nothing else does."
    )
    return Section(
        "What differs", [text], tables=[Table(["axis", "arm", "field: reference -> arm"], rows)]
    )


def command(verb: str, file: str, plan: Plan) -> str:
    """The command for a whole study: every option that differs from its default."""
    options = ["--quick"] if plan.quick else []
    if plan.folder != default_folder(file, plan.quick):
        options += ["--folder", str(plan.folder)]
    return shlex.join(["python", "experiments/study.py", verb, file, *options])


def reproduction_section(results: Results, file: str) -> Section:
    """With what the runs were made, and the commands that make them again."""
    plan, place = results.plan, Folder(results.plan.folder)
    made = _attempts(results)
    measured = [found for name in plan.models() if (found := place.read_measurement(name))]
    configs = json.dumps(definition(plan)["experiments"]).replace(
        f"{plan.folder}/", ""
    )  # wherever the folder is
    facts = {
        "runs": place.commands() or [f"{command('run', file, plan)} --seeds {plan.study.seeds}"],
        "report": [command("report", file, plan)],
        "commit": [one["commit"] + " with changes" * bool(one["changed_files"]) for one in made],
        "SHA-256 of all configs": [hashlib.sha256(configs.encode()).hexdigest()],
        "SHA-256 of the data": [one["data_sha256"] for one in measured],
        "device": [f"{one['devices']} x {one['device_kind']}" for one in measured],
        "processor": [f"{one['processor']}, {one['cores']} cores" for one in (*made, *measured)],
        "python": [one["python"] for one in made],
        "packages": [
            ", ".join(f"{name} {version}" for name, version in one["packages"].items())
            for one in made
        ],
        "hours of all runs, added up": [f"{sum(one['seconds'] for one in made) / 3600:.2f}"],
    }
    rows = [
        [Cell(name), Cell("; ".join(dict.fromkeys(values)) or "-")]
        for name, values in facts.items()
    ]
    return Section("How to make it again", tables=[Table(["", ""], rows)])


def _attempts(results: Results) -> list[dict]:
    """Of every run once, whichever axes it answers for, and of what arms build on."""
    records = {id(result): result.record for result in results.found.values()}
    first = [record.read(cfg.workdir) for cfg in results.plan.first.values()]
    return [attempt for one in (*first, *records.values()) for attempt in one.get("attempts", ())]
