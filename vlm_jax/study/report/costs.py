"""Report sections: costs, differences of the arms, and reproduction."""

import dataclasses
import hashlib
import json
import shlex

from vlm_jax.config import Experiment, Fusion
from vlm_jax.cost.chips import GIB
from vlm_jax.cost.flops import token_flow
from vlm_jax.plan import memory
from vlm_jax.plan.document import part_costs
from vlm_jax.study.planning import Plan
from vlm_jax.study.report.page import Cell, Section, Table, number_cell
from vlm_jax.study.report.results import Results
from vlm_jax.study.run import record
from vlm_jax.study.run.folder import Folder, as_json, default_folder, definition, diff

COST_COLUMNS = (
    "model",
    "parameters",
    "trained",
    "MFLOP forward",
    "MFLOP backward",
    "tokens in a row",
    "image tokens",
    "cache of an image, KiB",
    "peak memory, GiB",
    "examples/s",
    "decoded tokens/s",
)
COST_TEXT = (
    "An example is a training row: an image with the questions that share it, padding included, or "
    "packed conversations. FLOPs are per example. The last three columns are measured by a short "
    "run: peak memory of the training process (of the device if it reports one), examples per "
    "second of the fastest step, and decoded tokens per second for 32 questions at once."
)


def cost_section(results: Results) -> Section:
    """Returns the costs of every model, each arm at its own size first."""
    plan = results.plan
    folder = Folder(plan.folder)
    rows = [
        _cost_row(name, plan.resolve(cfg), folder.read_measurement(name))
        for name, cfg in plan.models().items()
    ]
    return Section("Cost", [COST_TEXT], tables=[Table(COST_COLUMNS, rows)])


def _cost_row(name: str, cfg: Experiment, measurement: dict | None) -> list[Cell]:
    parts = part_costs(cfg).values()
    tokens = token_flow(cfg)
    rows = cfg.train.batch_size
    forward_flops = sum(part["forward_flops"] for part in parts) / rows
    backward_flops = sum(part["backward_flops"] for part in parts) / rows
    parameters = sum(part["parameters"] for part in parts)
    trained = sum(part["trained_parameters"] for part in parts)
    numbers = [
        f"{parameters:,}",
        f"{trained:,}",
        f"{forward_flops / 1e6:,.1f}",
        f"{backward_flops / 1e6:,.1f}",
        f"{tokens.sequence:,}",
        f"{tokens.projected:,}",
        f"{image_cache_bytes(cfg) / 1024:,.1f}",
    ]
    if measurement is None:
        measured = ["-", "-", "-"]
    else:
        measured = [
            f"{measurement['peak_memory_bytes'] / GIB:.2f}",
            f"{rows / measurement['step_seconds']:,.0f}",
            f"{measurement['decoded_tokens_per_second']:,.0f}",
        ]
    return [Cell(name), *map(number_cell, numbers + measured)]


def image_cache_bytes(cfg: Experiment) -> int:
    """Returns bytes of the KV cache for the images of a row, in float32."""
    text_only = dataclasses.replace(cfg, fusion=Fusion(kind="text_only"))
    return memory.cache_bytes(cfg) - memory.cache_bytes(text_only)


def difference_section(results: Results) -> Section:
    """Returns the fields in which every arm differs from the reference."""
    plan = results.plan
    rows = []
    for (axis, arm), cfg in plan.arms.items():
        reference = as_json(plan.arms[axis, plan.study.reference])
        lines = diff(reference, as_json(cfg))
        rows.append([Cell(axis), Cell(arm), Cell("; ".join(lines) or "nothing")])
    text = (
        f"All fields in which an arm differs from {plan.study.reference}, matched fields included."
    )
    table = Table(["axis", "arm", "field: reference -> arm"], rows)
    return Section("What differs", [text], tables=[table])


def study_command(command: str, file: str, plan: Plan) -> str:
    """Returns the command line for the whole study, with all options that are not defaults."""
    options = ["--quick"] if plan.quick else []
    if plan.folder != default_folder(file, plan.quick):
        options += ["--folder", str(plan.folder)]
    return shlex.join(["python", "experiments/study.py", command, file, *options])


def reproduction_section(results: Results, file: str) -> Section:
    """Returns the commands, versions and machines of the runs."""
    plan = results.plan
    folder = Folder(plan.folder)
    attempts = _attempts(results)
    measurements = [folder.read_measurement(name) for name in plan.models()]
    measurements = [measurement for measurement in measurements if measurement is not None]
    machines = [*attempts, *measurements]
    default_command = f"{study_command('run', file, plan)} --seeds {plan.study.seeds}"
    hours = sum(attempt["seconds"] for attempt in attempts) / 3600
    facts = {
        "runs": folder.commands() or [default_command],
        "report": [study_command("report", file, plan)],
        "commit": map(_commit, attempts),
        "SHA-256 of all configs": [_config_hash(plan)],
        "SHA-256 of the data": [measurement["data_sha256"] for measurement in measurements],
        "device": [f"{entry['devices']} x {entry['device_kind']}" for entry in measurements],
        "processor": [f"{entry['processor']}, {entry['cores']} cores" for entry in machines],
        "python": [attempt["python"] for attempt in attempts],
        "packages": map(_packages, attempts),
        "hours of all runs, added up": [f"{hours:.2f}"],
    }
    rows = [
        [Cell(name), Cell("; ".join(dict.fromkeys(values)) or "-")]
        for name, values in facts.items()
    ]
    return Section("How to make it again", tables=[Table(["", ""], rows)])


def _commit(attempt: dict) -> str:
    return attempt["commit"] + (" with changes" if attempt["changed_files"] else "")


def _packages(attempt: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in attempt["packages"].items())


def _config_hash(plan: Plan) -> str:
    """Returns the SHA-256 of all experiments, which does not depend on the study's folder."""
    configs = json.dumps(definition(plan)["experiments"]).replace(f"{plan.folder}/", "")
    return hashlib.sha256(configs.encode()).hexdigest()


def _attempts(results: Results) -> list[dict]:
    """Returns the attempts of all prerequisites, and of every run once."""
    # A run that serves several axes has one result, with one record.
    records = {id(result): result.record for result in results.finished.values()}
    first = results.plan.prerequisites_of(results.plan.runs())
    prerequisites = [record.read(run.cfg.workdir) for run in first]
    attempts = []
    for run_record in (*prerequisites, *records.values()):
        attempts += run_record.get("attempts", [])
    return attempts
