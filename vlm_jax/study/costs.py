"""The sections of a report about what it costs, and how to come by it again."""

import dataclasses
import hashlib

from vlm_jax.chips import GIB
from vlm_jax.config import Experiment, Fusion
from vlm_jax.flops import token_flow
from vlm_jax.plan import document, memory
from vlm_jax.study import matching
from vlm_jax.study.folder import Folder, as_json, differences
from vlm_jax.study.page import Cell, Section, Table
from vlm_jax.study.results import Results
from vlm_jax.study.scores import number


def cost_section(results: Results) -> Section:
    """Every model that was run, an arm at its own size first."""
    plan, place = results.plan, Folder(results.plan.folder)
    rows = [_row(name, cfg, place.read_measurement(name)) for name, cfg in plan.models().items()]
    columns = [
        *("model", "parameters", "trained", "MFLOP forward", "MFLOP backward", "tokens in a row", "image tokens"),
        *("cache of an image, KiB", "peak memory, GiB", "examples/s", "decoded tokens/s"),
    ]
    text = (
        "FLOPs are of one training question, its share of the image included. A row is what the decoder reads at once: "
        "one image and the questions that share it. The last three columns are measured by a short run alone: peak "
        "memory of the training process (of a device where it says so), training examples, and tokens that are decoded "
        "for 32 questions at once."
    )
    return Section("Cost", [text], tables=[Table(columns, rows)])


def _row(name: str, cfg: Experiment, measured: dict | None) -> list[Cell]:
    parts, tokens, examples = document.parts(cfg).values(), token_flow(cfg), matching.examples_a_step(cfg)
    forward, backward = (sum(part[f"{way}_flops"] for part in parts) / examples for way in ("forward", "backward"))
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
        speeds = [f"{peak:.2f}", f"{measured['examples_per_second']:,.0f}", f"{decoded:,.0f}"]
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
        f"Every field in which an arm differs from {plan.study.reference}, matched fields included; nothing else does."
    )
    return Section("What differs", [text], tables=[Table(["axis", "arm", "field: reference -> arm"], rows)])


def reproduction_section(results: Results, file: str) -> Section:
    """With what the runs were made, and the command that makes them again."""
    plan, place = results.plan, Folder(results.plan.folder)
    records = [result.record for result in results.found.values() if result.record]
    measured = [found for name in plan.models() if (found := place.read_measurement(name))]
    facts = {
        "command": [f"python experiments/study.py run {file} --seeds {plan.study.seeds}"],
        "commit": [one["commit"] + " with changes" * bool(one["changed_files"]) for one in records],
        "SHA-256 of all configs": [hashlib.sha256(place.definition.read_bytes()).hexdigest()],
        "SHA-256 of the data": [one["data_sha256"] for one in measured],
        "device": [f"{one['devices']} x {one['device_kind']}" for one in measured],
        "processor": [f"{one['processor']}, {one['cores']} cores" for one in records],
        "python": [one["python"] for one in records],
        "packages": [", ".join(f"{name} {version}" for name, version in one["packages"].items()) for one in records],
        "hours of all runs": [f"{_hours(results):.2f}"],
    }
    rows = [[Cell(name), Cell("; ".join(dict.fromkeys(values)) or "-")] for name, values in facts.items()]
    return Section("How to make it again", tables=[Table(["", ""], rows)])


def _hours(results: Results) -> float:
    runs = {result.record["command"][-1]: result.record for result in results.found.values() if result.record}
    return sum(attempt["seconds"] for one in runs.values() for attempt in one["attempts"]) / 3600
