"""What a model costs where it runs, by a short run: `python -m vlm_jax.study.run.measuring CONFIG.json OUT.json`.

Random parameters do as well as trained ones. The step is the one that the runs will want: it is compiled here.
"""

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import jax

from vlm_jax import axes
from vlm_jax.cli import commands
from vlm_jax.config import Data, Experiment, files
from vlm_jax.data import pipeline, questions, sources
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.generate import SamplingParams, generate
from vlm_jax.runtime.workdir import write_atomic
from vlm_jax.structs import State
from vlm_jax.study.run import record
from vlm_jax.train import initial
from vlm_jax.train.log import hbm_peak_bytes
from vlm_jax.train.step import (
    abstract_state,
    cast_to_compute_dtype,
    compile_train_step,
    init_sharded_state,
)

STEPS, UNTIMED_STEPS = 12, 2
DECODED_ROWS, DECODED_TOKENS, DECODINGS = 32, 64, 3


def measure(cfg: Experiment) -> dict:
    """Seconds of a step, peak memory, decoded tokens a second; on what machine, with which data.

    Speeds are those of the fastest turn, which other work on the machine disturbs least.
    """
    mesh = axes.make_mesh(cfg.mesh)
    tokenizer = initial.load_tokenizer(cfg)
    state = init_sharded_state(cfg, mesh, initial.load_parts(cfg, abstract_state(cfg, mesh), mesh))
    state, of_steps = _measure_steps(cfg, mesh, tokenizer, state)
    return {
        **of_steps,
        "decoded_tokens_per_second": _decoding_speed(
            cfg, mesh, tokenizer, cast_to_compute_dtype(cfg, state.params)
        ),
        "data_sha256": data_hash(cfg),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processor": record.processor(),
        "cores": os.cpu_count(),
    }


def _measure_steps(cfg: Experiment, mesh, tokenizer: Tokenizer, state: State) -> tuple[State, dict]:
    step_fn = None
    data, taken = pipeline.training_iterator(cfg, tokenizer), []
    for _ in range(UNTIMED_STEPS + STEPS):
        batch = axes.place_own_rows(next(data), mesh)
        step_fn = step_fn or compile_train_step(cfg, mesh, state, batch)
        begun = time.perf_counter()
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - begun)
    memory = hbm_peak_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return state, {"step_seconds": min(taken[UNTIMED_STEPS:]), "peak_memory_bytes": memory}


def _decoding_speed(cfg: Experiment, mesh, tokenizer: Tokenizer, params) -> float:
    """Tokens a second of all rows together, the prompts read before."""
    if cfg.eval.read_split:
        asked = questions.to_evaluate(
            replace(cfg, eval=replace(cfg.eval, max_examples=DECODED_ROWS))
        )
    else:
        asked = questions.load(cfg, cfg.data.train_split, DECODED_ROWS)
    rows = axes.round_up_to_shards(len(asked), mesh)
    asked = [asked[i % len(asked)] for i in range(rows)]
    batch = questions.question_batch(cfg, tokenizer, asked, asked)
    count = min(DECODED_TOKENS, cfg.decoder.max_positions - batch.tokens.shape[1])

    def seconds(tokens: int) -> float:
        with jax.set_mesh(mesh):
            placed = axes.place_rows(batch, mesh)
            return _seconds(lambda: generate(cfg.model, params, placed, tokens, SamplingParams()))

    return rows * (count - 1) / max(seconds(count) - seconds(1), 1e-9)


def _seconds(work: Callable[[], jax.Array]) -> float:
    """Of the fastest call, after one that compiles."""
    jax.block_until_ready(work())
    taken = []
    for _ in range(DECODINGS):
        begun = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - begun)
    return min(taken)


def data_hash(cfg: Experiment) -> str:
    """SHA-256 over the splits that are learned from and asked: texts and encoded images; of conversations the texts."""
    digest = hashlib.sha256()
    splits = [(cfg.data, cfg.data.train_split), (cfg.eval_data, cfg.eval.read_split)]
    for data, split in [pair for pair in splits if pair[1]]:
        for part in _contents(data, split):
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()


def _contents(data: Data, split: str) -> Iterable[bytes | tuple[str, ...]]:
    if data.is_conversations:
        yield from (talk.turns for talk in pipeline.conversation_source(data, split))
        return
    for one in sources.load(data, split):
        yield from (one.image, one.questions, one.answers, one.types)


def main(config: str, out: str) -> None:
    cfg = files.from_json(Path(config).read_text(), config)
    commands.enable_compilation_cache(cfg)
    write_atomic(Path(out), json.dumps(measure(cfg), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
