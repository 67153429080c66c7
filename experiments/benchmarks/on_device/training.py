"""A training step's time, MFU and memory against the plan's prediction; an exact resume."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import turns
from on_device import models
from on_device.facts import memory_limit_bytes

from vlm_jax import axes, sharding
from vlm_jax.config import Mesh
from vlm_jax.cost.flops import train_flops
from vlm_jax.cost.peak_flops import peak_flops_per_second
from vlm_jax.plan.memory import predict_memory
from vlm_jax.structs import State
from vlm_jax.train.step import abstract_state, compile_train_step, init_sharded_state

SECONDS = 6.0  # of timed steps; a tiny model takes as few as it can
# Rows are halved until the plan's prediction takes at most this share of the memory.
MAX_SHARE_OF_MEMORY = 0.85
GIB = 2**30
# Two pairs of runs on a device that is not deterministic differ by amounts of one order.
NOISE_FACTOR = 4


def one_device_mesh() -> jax.sharding.Mesh:
    return axes.make_mesh(Mesh(), jax.devices()[:1])


class Step:
    """The training step of a model on one device."""

    def __init__(self, kind: str, size: str):
        self.cfg = models.experiment(kind, size)
        self.timed_seconds = 0.0 if size == "tiny" else SECONDS
        self.mesh = one_device_mesh()
        self.device = jax.devices()[0]
        # Unless `plan` fails.
        self.predicted_bytes = self.flops = math.nan

    def tasks(self) -> dict[str, Callable[[], dict]]:
        return {"plan": self.plan, "step": self.step}

    def plan(self) -> dict:
        """Counts the FLOPs, predicts the memory, and takes fewer rows until they fit."""
        flops_of_row = train_flops(self.cfg) / self.cfg.train.batch_size
        limit = memory_limit_bytes(self.device) or math.inf
        while True:
            predicted = predict_memory(self.cfg, self.mesh.abstract_mesh)
            self.predicted_bytes = predicted.total
            rows = self.cfg.train.batch_size
            if rows == 1 or self.predicted_bytes <= MAX_SHARE_OF_MEMORY * limit:
                break
            self.cfg = replace(self.cfg, train=replace(self.cfg.train, batch_size=rows // 2))
        self.flops = rows * flops_of_row
        return {"predicted GiB": self.predicted_bytes / GIB, "TFLOP": self.flops / 1e12}

    def step(self) -> dict:
        cfg, mesh = self.cfg, self.mesh
        with jax.set_mesh(mesh):
            state = init_sharded_state(cfg, mesh, {})
            parameters = sum(x.size for x in jax.tree.leaves(state.params))
            jax.block_until_ready(state)
            init_peak = self._peak_bytes()
            batch = jax.device_put(models.training_batch(cfg), sharding.row_sharding(mesh))
            start = time.perf_counter()
            step = compile_train_step(cfg, mesh, state, batch)
            compile_seconds = time.perf_counter() - start
            held = {"state": state}
            del state

            def take() -> float:
                held["state"], metrics = step(held["state"], batch)
                return float(metrics["loss"])

            losses = [take(), take()]
            times = turns.times(take, self.timed_seconds)
            losses.append(take())
        seconds, rows = times["seconds"], cfg.train.batch_size
        peak = self._peak_flops_per_second()
        peak_bytes = self._peak_bytes()
        return {
            "parameters": parameters,
            "rows": rows,
            "tokens per row": cfg.row_length,
            "seconds": seconds,
            "fastest": times["best_seconds"],
            "MFU": self.flops / seconds / peak if peak else math.nan,
            "TFLOP/s": self.flops / seconds / 1e12,
            "tokens/s": rows * cfg.row_length / seconds,
            "images/s": rows * cfg.data.images_per_row / seconds,
            "peak GiB": peak_bytes / GIB,
            "peak after initialization GiB": init_peak / GIB,
            "predicted GiB": self.predicted_bytes / GIB,
            "peak over predicted": peak_bytes / self.predicted_bytes,
            "XLA's buffers GiB": _compiled_bytes(step) / GIB,
            "compile seconds": compile_seconds,
            "first loss": losses[0],
            "last loss": losses[-1],
            "passed": bool(np.isfinite(losses).all()) and losses[-1] < losses[0],
        }

    def _peak_bytes(self) -> float:
        """Returns the peak of the process so far; NaN where JAX does not know it, as on a CPU."""
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use", math.nan)

    def _peak_flops_per_second(self) -> float | None:
        """Returns the peak rate of one device; None for a chip that is not in CHIPS."""
        peak = peak_flops_per_second(self.cfg.train.compute_dtype)
        is_shared = self.device.platform == "cpu" or peak is None
        return peak if is_shared else peak / jax.device_count()


def _compiled_bytes(step: jax.stages.Compiled) -> float:
    """Returns the bytes of a program's arguments, results and temporaries, as XLA plans them."""
    memory = step.memory_analysis()
    if memory is None:
        return math.nan
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def resume() -> dict:
    """Takes two steps, saves, and takes two more: once on from memory, twice from the checkpoint.

    The restored state must be equal bit by bit. Later states are equal, too, unless the device sums
    in a varying order: then they may differ from the first run by a few times as much as the two
    restored runs do from each other, and `is deterministic` is false.
    """
    # Imported here: only this row needs everything in requirements.txt.
    from vlm_jax.train.checkpoint import Checkpoints

    cfg, mesh = models.experiment("unified", "tiny"), one_device_mesh()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        state = init_sharded_state(cfg, mesh, {})
        batches = [
            jax.device_put(models.training_batch(cfg, seed), sharding.row_sharding(mesh))
            for seed in range(4)
        ]
        step = compile_train_step(cfg, mesh, state, batches[0])

        def take(state: State, batches: list) -> State:
            for batch in batches:
                state, _ = step(state, batch)
            return state

        state = take(state, batches[:2])
        saved = jax.device_get(state)
        checkpoints = Checkpoints(Path(folder), cfg.train)
        checkpoints.save(2, state, {}, loss=0.0)
        checkpoints.close()
        uninterrupted = take(state, batches[2:])

        def restore() -> State:
            checkpoints = Checkpoints(Path(folder), cfg.train)
            restored, _ = checkpoints.restore(abstract_state(cfg, mesh))
            checkpoints.close()
            return restored

        restored_difference = largest_difference(restore(), saved)
        resumed, again = take(restore(), batches[2:]), take(restore(), batches[2:])
    difference = largest_difference(resumed, uninterrupted)
    noise = largest_difference(resumed, again)
    return {
        "largest difference": difference,
        "restored": restored_difference,
        "between equal runs": noise,
        "is deterministic": noise == 0,
        "passed": restored_difference == 0 and difference <= NOISE_FACTOR * noise,
    }


def largest_difference(state: State, other: State) -> float:
    """Returns the largest absolute difference of two states; NaN if one holds a NaN."""
    pairs = zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(jax.device_get(other)))
    return float(max(np.abs(np.subtract(a, b, dtype=np.float64)).max() for a, b in pairs))
