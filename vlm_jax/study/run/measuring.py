"""Measured costs of a model: `python -m vlm_jax.study.run.measuring CONFIG.json OUT.json`.

Parameters are random. The training step is the one of the runs, which find it in the compilation
cache afterwards.
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

from vlm_jax import axes, sharding
from vlm_jax.cli.train import enable_compilation_cache
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

WARMUP_STEPS = 2
TIMED_STEPS = 12
DECODED_ROWS = 32
DECODED_TOKENS = 64
TIMED_DECODINGS = 3


def measure(cfg: Experiment) -> dict:
    """Returns seconds of a step, peak memory, decoded tokens per second, machine and data.

    Times are of the fastest call, which other work on the machine disturbs least.
    """
    mesh = axes.make_mesh(cfg.mesh)
    tokenizer = initial.load_tokenizer(cfg)
    parts = initial.load_parts(cfg, abstract_state(cfg, mesh), mesh)
    state = init_sharded_state(cfg, mesh, parts)
    state, step_costs = _measure_steps(cfg, mesh, tokenizer, state)
    params = cast_to_compute_dtype(cfg, state.params)
    return {
        **step_costs,
        "decoded_tokens_per_second": _decoding_speed(cfg, mesh, tokenizer, params),
        "data_sha256": data_hash(cfg),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processor": record.processor(),
        "cores": os.cpu_count(),
    }


def _measure_steps(cfg: Experiment, mesh, tokenizer: Tokenizer, state: State) -> tuple[State, dict]:
    data = pipeline.training_iterator(cfg, tokenizer)
    step_fn = None
    step_seconds = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        batch = sharding.place_own_rows(next(data), mesh)
        # Compile with the shapes of the first batch.
        step_fn = step_fn or compile_train_step(cfg, mesh, state, batch)
        start = time.perf_counter()
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(metrics)
        step_seconds.append(time.perf_counter() - start)
    peak_bytes = hbm_peak_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return state, {
        "step_seconds": min(step_seconds[WARMUP_STEPS:]),
        "peak_memory_bytes": peak_bytes,
    }


def _decoding_speed(cfg: Experiment, mesh, tokenizer: Tokenizer, params) -> float:
    """Returns decoded tokens per second of all rows together, prefill excluded."""
    batch = _question_batch(cfg, mesh, tokenizer)
    rows, prompt_length = batch.tokens.shape
    count = min(DECODED_TOKENS, cfg.decoder.max_positions - prompt_length)

    def seconds(new_tokens: int) -> float:
        with jax.set_mesh(mesh):
            sharded = sharding.place_rows(batch, mesh)
            return _fastest_seconds(
                lambda: generate(cfg.model, params, sharded, new_tokens, SamplingParams())
            )

    # The first token is the prefill's.
    return rows * (count - 1) / max(seconds(count) - seconds(1), 1e-9)


def _question_batch(cfg: Experiment, mesh, tokenizer: Tokenizer):
    """Returns a batch of test questions, repeated to fill the rows."""
    if cfg.eval.read_split:
        limited = replace(cfg, eval=replace(cfg.eval, max_examples=DECODED_ROWS))
        available = questions.to_evaluate(limited)
    else:
        available = questions.load(cfg, cfg.data.train_split, DECODED_ROWS)
    row_count = axes.round_up_to_shards(len(available), mesh)
    rows = [available[i % len(available)] for i in range(row_count)]
    return questions.question_batch(cfg, tokenizer, rows, rows)


def _fastest_seconds(work: Callable[[], jax.Array]) -> float:
    """Returns the seconds of the fastest call, after one that compiles."""
    jax.block_until_ready(work())
    seconds = []
    for _ in range(TIMED_DECODINGS):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def data_hash(cfg: Experiment) -> str:
    """Returns the SHA-256 of the training and test splits: texts and encoded images.

    Of conversations, the texts alone.
    """
    digest = hashlib.sha256()
    splits = [(cfg.data, cfg.data.train_split), (cfg.eval_data, cfg.eval.read_split)]
    for data, split in splits:
        if not split:
            continue
        for part in _contents(data, split):
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()


def _contents(data: Data, split: str) -> Iterable[bytes | tuple[str, ...]]:
    for part in data.parts.values():
        # The split to train on is a field of each source.
        part_split = part.train_split if split == data.train_split else split
        if part.is_conversations:
            for conversation in pipeline.conversation_source(part, part_split):
                yield conversation.turns
            continue
        for example in sources.load(part, part_split):
            yield from (example.image, example.questions, example.answers, example.types)


def main(config: str, out: str) -> None:
    cfg = files.from_json(Path(config).read_text(), config)
    enable_compilation_cache(cfg)
    write_atomic(Path(out), json.dumps(measure(cfg), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
