"""The one training loop. Its order is a contract:

    next batch -> step -> log the previous step -> (when due, or on SIGTERM) check and save -> (on SIGTERM) stop -> ...

The metrics of the previous step are read while the device works on this one, so that it never waits; only the first
step is logged as soon as it is done. A loss that is not finite stops the run before anything of it is saved.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vlm_jax import axes
from vlm_jax.config import ConfigError, Experiment, NonFiniteError
from vlm_jax.cost.flops import train_flops
from vlm_jax.cost.peak_flops import peak_flops_per_second
from vlm_jax.data import length_check, pipeline
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.runtime import distributed, preemption
from vlm_jax.runtime.preemption import Preempted
from vlm_jax.runtime.stop_signal import StopSignal
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.structs import PADDING, Batch, State
from vlm_jax.train import initial
from vlm_jax.train.checkpoint import NO_LOSSES, Checkpoints, SaveError
from vlm_jax.train.log import Log, StepStats
from vlm_jax.train.not_finite import first_nonfinite_parameter
from vlm_jax.train.profile import Profile
from vlm_jax.train.step import abstract_state, compile_train_step, init_sharded_state
from vlm_jax.train.summary import summarize


@dataclass(frozen=True)
class Run:
    """What the steps need beside the state."""

    cfg: Experiment
    mesh: jax.sharding.Mesh
    data: Iterator[Batch]  # with `get_state` and `set_state`
    checkpoints: Checkpoints
    log: Log | None  # None on every process but the first
    notice: StopSignal


def train(cfg: Experiment) -> State:
    """Trains in `cfg.workdir`, from its last checkpoint if it has one, and returns the last state.

    Raises:
      ConfigError: the batch does not fit the devices, the config does not fit the data, or the work folder is another
        run's; nothing is written then.
      NonFiniteError: the loss is not finite; the last checkpoint stays.
      SaveError: a checkpoint could not be written, that after a SIGTERM among them; those before it stay.
      Preempted: the process had a SIGTERM; the step that ran then is saved.
    """
    workdir = Workdir(cfg.workdir)
    is_main = jax.process_index() == 0  # this one alone writes, but for its share of a checkpoint
    with contextlib.ExitStack() as stack:
        with distributed.raise_on_all():
            if is_main:
                workdir.refuse_second()
            mesh = axes.make_mesh(cfg.mesh)
            check_rows(cfg, mesh)
            workdir.check(cfg)
            tokenizer = initial.load_tokenizer(cfg)
            data = pipeline.training_iterator(cfg, tokenizer, *axes.share_of_rows(mesh))
            contents = pipeline.contents(cfg, tokenizer)
            workdir.check_data(contents)
            check_data(cfg, tokenizer, data)
            at_peak = seconds_at_peak(cfg, mesh)
        with distributed.raise_on_all():
            if is_main:
                stack.enter_context(workdir.locked())
                workdir.open(cfg)
                workdir.keep_data(contents)
                with workdir.writing():
                    if not workdir.tokenizer.exists():
                        tokenizer.save(workdir.tokenizer)
                    initial.keep_processor(cfg, workdir)
        stack.enter_context(jax.set_mesh(mesh))
        notice = StopSignal(mesh)
        checkpoints = Checkpoints(workdir.checkpoints, cfg.train)
        state, start = begin(cfg, mesh, data, checkpoints)
        if is_main:
            print(summarize(cfg, mesh, state.params, start), flush=True)
        log = (
            Log(workdir, start, cfg.train, at_peak, checkpoints.loss_sum(start))
            if is_main
            else None
        )
        with (
            preemption.handler(notice.note),
            closing(log, checkpoints),
        ):  # while a checkpoint is awaited, too
            return run_steps(Run(cfg, mesh, data, checkpoints, log, notice), state)


@contextlib.contextmanager
def closing(log: Log | None, checkpoints: Checkpoints):
    """Closes both; what stopped the run is what is said, whatever else a full disk makes of the closing.

    But where SIGTERM stopped it and the step could not be saved, that is said: it was promised.
    """
    try:
        yield
        if log is not None:
            log.close()
    except BaseException as error:
        with contextlib.suppress(OSError):
            if log is not None:
                log.close()
        if not distributed.is_alone(
            error
        ):  # of a checkpoint the other processes would have to write their share
            with (
                contextlib.nullcontext()
                if isinstance(error, Preempted)
                else contextlib.suppress(SaveError)
            ):
                checkpoints.close()
        if isinstance(error, OSError):
            raise SaveError(
                f"the run cannot go on ({error}); {checkpoints.last_whole()}."
            ) from error
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            raise SaveError(
                f"the run cannot go on ({str(error).splitlines()[0]}): where another process ended, its output says "
                f"why; {checkpoints.last_whole()}."
            ) from error
        raise
    checkpoints.close()


def seconds_at_peak(cfg: Experiment, mesh: jax.sharding.Mesh) -> float | None:
    """What a step would take if all devices multiplied matrices at their best rate all the time."""
    peak = peak_flops_per_second(cfg.train.compute_dtype)
    with jax.set_mesh(mesh):  # where the parameters are made later: their shapes are traced once
        return peak and train_flops(cfg) / peak


def check_rows(cfg: Experiment, mesh: jax.sharding.Mesh) -> None:
    shards = axes.row_shards(mesh)
    parts = shards * cfg.train.microbatches
    if cfg.train.batch_size % parts:
        times = (
            f" times train.microbatches {cfg.train.microbatches}"
            if cfg.train.microbatches > 1
            else ""
        )
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not divisible by the {shards} devices of mesh.data x "
            f"mesh.fsdp{times}: choose a multiple of {parts}."
        )


def check_data(cfg: Experiment, tokenizer: Tokenizer, data) -> None:
    """Makes the first batch and measures every question: a mistake must not show in the midst of the training.

    The first process says how many questions are left out of their rows, if any are.
    """
    length_check.check_lengths(cfg, tokenizer)
    if not jax.process_index() and (said := length_check.dropped_questions_message(cfg, tokenizer)):
        print(said, flush=True)
    first = data.get_state()
    next(data)
    data.set_state(first)


def begin(cfg: Experiment, mesh, data, checkpoints: Checkpoints) -> tuple[State, int]:
    """A new state, every parameter made where it lies, or that of the last whole checkpoint; and its step."""
    like = abstract_state(cfg, mesh)
    restored = checkpoints.restore(like)
    if restored is None:
        return init_sharded_state(cfg, mesh, initial.load_parts(cfg, like, mesh)), 0
    state, data_state = restored
    data.set_state(data_state)
    print(f"continuing from step {int(state.step)} in {cfg.workdir}", flush=True)
    return state, int(state.step)


def run_steps(run: Run, state: State) -> State:
    """The steps that are left, in the order that the module states."""
    cfg = run.cfg.train
    first, step_fn = int(state.step) + 1, None
    before, losses = None, []  # since the last checkpoint
    with contextlib.closing(Profile(cfg, Workdir(run.cfg.workdir))) as profile:
        for step in range(first, cfg.steps + 1):
            asked = time.perf_counter()
            place = run.data.get_state()
            batch = next(run.data)
            waited = time.perf_counter() - asked
            on_device = axes.place_own_rows(batch, run.mesh)
            step_fn = step_fn or compile_step(run, state, on_device)
            profile.before(step)
            state, metrics = step_fn(state, on_device)
            profile.after(step, metrics)
            if before is not None:
                losses.append(note(run, *before))
            stop = run.notice.stop()
            before = (step, metrics | {"counts": count_tokens(on_device)}, waited, place)
            is_saved = stop or step % cfg.checkpoint_every_steps == 0 or step == cfg.steps
            if is_saved or step == first:
                losses.append(note(run, *before))
                before = None
            if is_saved:
                loss_sum = (
                    run.log.loss_sum if run.log else NO_LOSSES
                )  # only the process that logs writes it
                run.checkpoints.save(
                    step, state, run.data.get_state(), statistics.fmean(losses), loss_sum
                )
                losses = []
            if stop:
                raise Preempted(
                    f"stopped by SIGTERM after step {step}, which is saved: the same command continues it."
                )
    return state


def compile_step(
    run: Run, state: State, batch: Batch
) -> Callable[[State, Batch], tuple[State, dict]]:
    """`compile_train_step`, with a line about the compilation on the process that logs."""
    with run.log.compiling() if run.log else contextlib.nullcontext():
        return compile_train_step(run.cfg, run.mesh, state, batch)


@jax.jit
def count_tokens(batch: Batch) -> tuple:
    """Tokens, slots, images, image slots and examples of a batch, over all processes: the first fields of `StepStats`."""
    seen = batch.image_mask.any(axis=1)
    examples = jnp.sum(jnp.maximum(batch.segment_ids, batch.branch_ids).max(axis=1))
    return (
        jnp.sum(batch.segment_ids != PADDING),
        batch.tokens.size,
        jnp.sum(seen),
        seen.size,
        examples,
    )


def note(run: Run, step: int, metrics: dict, data_wait_seconds: float, place: dict) -> float:
    """Writes the step down and returns its loss; `place` is that of its batch in the data."""
    metrics = jax.device_get(metrics)
    finite, largest, counts = (metrics.pop(name) for name in ("finite", "largest", "counts"))
    metrics = {name: float(value) for name, value in metrics.items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            held = pipeline.batch_ids(run.cfg, initial.load_tokenizer(run.cfg), place)
            raise NonFiniteError(
                f"step {step}: the {name} is {metrics[name]}; {first_nonfinite_parameter(finite, largest)}. What was saved before is "
                f"kept. The batch held the {'conversations' if run.cfg.data.is_conversations else 'images'} "
                f"{', '.join(map(str, held))}."
            )
    if run.log is not None:
        run.log.step(step, metrics, StepStats(*map(int, counts), data_wait_seconds))
    return metrics["loss"]
