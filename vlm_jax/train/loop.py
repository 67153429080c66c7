"""The one training loop.

    next batch -> step -> log the previous step -> (when due) check, validate -> (when due, or on
    SIGTERM) check, save -> stop?

The metrics of a step are read while the devices compute the next one, so that the devices never
wait for the host. A step whose loss is not finite stops the run before it is saved.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import sharding
from vlm_jax.config import Experiment, NonFiniteError
from vlm_jax.data import pipeline
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.runtime import distributed, preemption
from vlm_jax.runtime.preemption import Preempted
from vlm_jax.runtime.stop_signal import StopSignal
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.structs import PADDING, Batch, State
from vlm_jax.train import initial
from vlm_jax.train.checkpoint import NO_LOSSES, Checkpoints, SaveError
from vlm_jax.train.inputs import Inputs, open_workdir, prepare
from vlm_jax.train.log import Log, StepStats
from vlm_jax.train.not_finite import NonFiniteStepError, check_finite
from vlm_jax.train.profile import Profile
from vlm_jax.train.step import abstract_state, compile_train_step, init_sharded_state
from vlm_jax.train.summary import summarize
from vlm_jax.train.trackers import start_trackers
from vlm_jax.train.validation import PrepareScores, ScoreHistory, Validation, score_name


@dataclass(frozen=True)
class Run:
    """The arguments of `run_steps`, beside the state."""

    cfg: Experiment
    inputs: Inputs
    checkpoints: Checkpoints
    log: Log | None  # None on every process but the first
    stop_signal: StopSignal
    validation: Validation
    step_program: Future | None  # of `compile_step`; None: no step is left


@dataclass(frozen=True)
class PendingStep:
    """A step that was launched and is not logged yet."""

    step: int
    metrics: dict  # of `train_step`, on the devices
    counts: tuple  # of `count_tokens`, on the devices
    data_wait_seconds: float
    data_state: dict  # position of its batch in the data


def train(cfg: Experiment, prepare_scores: PrepareScores | None = None) -> State:
    """Trains in `cfg.workdir`, from its last checkpoint if it has one, and returns the last state.

    Args:
      cfg: the experiment.
      prepare_scores: `infer.validation.prepare_scores`, for an experiment with eval.every_steps.

    Raises:
      ConfigError: the batch does not fit the devices, the config does not fit the data, or the work
        folder belongs to another run; nothing is written.
      NonFiniteError: the loss is not finite; earlier checkpoints stay.
      SaveError: a checkpoint could not be written, even after SIGTERM; earlier ones stay.
      Preempted: the process received SIGTERM; the step that was running is saved.
    """
    workdir = Workdir(cfg.workdir)
    is_main = jax.process_index() == 0  # writes everything but the other processes' shards
    with contextlib.ExitStack() as stack:
        with distributed.raise_on_all():
            if is_main:
                workdir.refuse_second()
            inputs = prepare(cfg, workdir)
            compute_scores = None
            if cfg.eval.every_steps is not None:
                compute_scores = prepare_scores(cfg, inputs)
        with distributed.raise_on_all():
            if is_main:
                stack.enter_context(workdir.locked())
                open_workdir(cfg, workdir, inputs)
        stack.enter_context(jax.set_mesh(inputs.mesh))
        stop_signal = StopSignal(inputs.mesh)
        history = ScoreHistory(score_name(cfg))
        rank = None if compute_scores is None else history.rank
        checkpoints = Checkpoints(workdir.checkpoints, cfg.train, rank)
        abstract = abstract_state(cfg, inputs.mesh)
        step_program = None
        if checkpoints.last_step < cfg.train.steps:
            step_program = compile_in_thread(cfg, inputs, abstract)
        state, start = restore_or_init(cfg, inputs, abstract, checkpoints)
        if step_program is None and start < cfg.train.steps:
            # The last checkpoint is damaged.
            step_program = compile_in_thread(cfg, inputs, abstract)
        history.scores |= checkpoints.scores(start)
        log, validation = None, Validation(cfg, compute_scores, history)
        if is_main:
            print(summarize(cfg, inputs.mesh, inputs.tokenizer, state.params, start), flush=True)
            log = Log(
                workdir,
                start,
                cfg.train,
                inputs.seconds_at_peak,
                checkpoints.loss_sum(start),
                inputs.data_counts,
                start_trackers(cfg, workdir),
                validation.is_due(start),
                [source.name for source in cfg.data.mixture],
            )
            validation.log = log
        # SIGTERM is handled until the last checkpoint is written, too.
        with preemption.handler(stop_signal.on_signal), closing(log, checkpoints):
            try:
                run = Run(cfg, inputs, checkpoints, log, stop_signal, validation, step_program)
                state = run_steps(run, state)
            except NonFiniteStepError as error:
                batch = describe_batch(cfg, inputs.tokenizer, error.data_state)
                raise NonFiniteError(f"{error} {batch}") from error
        if validation.describe_end(int(state.step)):
            print(validation.describe_end(int(state.step)), flush=True)
        return state


@contextlib.contextmanager
def closing(log: Log | None, checkpoints: Checkpoints):
    """Closes the log and waits for the last checkpoint, also after an error."""
    try:
        yield
        if log is not None:
            log.close()
    except BaseException as error:
        close_quietly(log, checkpoints, error)
        save_error = as_save_error(error, checkpoints)
        if save_error is None:
            raise
        raise save_error from error
    checkpoints.close()


def close_quietly(log: Log | None, checkpoints: Checkpoints, error: BaseException) -> None:
    """Closes both after `error`, which the user must see.

    Whatever stopped the run, such as a full disk, may make closing fail, too: those errors are
    suppressed. But after SIGTERM a step that could not be saved raises SaveError, because a
    `Preempted` error promises that it is saved.
    """
    with contextlib.suppress(OSError):
        if log is not None:
            log.close()
    # Other processes would have to write their shards of the checkpoint, and do not know the error.
    if distributed.is_alone(error):
        return
    try:
        checkpoints.close()
    except SaveError:
        if isinstance(error, Preempted):
            raise


def as_save_error(error: BaseException, checkpoints: Checkpoints) -> SaveError | None:
    """Returns a disk error, or the loss of a process, as a sentence with the last checkpoint.

    The message of the operating system or of XLA does not tell from where the run can continue.
    """
    if isinstance(error, OSError):
        return SaveError(f"the run cannot continue ({error}); {checkpoints.last_whole()}.")
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        first_line = str(error).splitlines()[0]
        return SaveError(
            f"the run cannot continue ({first_line}): if another process ended, its output has the "
            f"reason; {checkpoints.last_whole()}."
        )
    return None


def restore_or_init(
    cfg: Experiment, inputs: Inputs, abstract: State, checkpoints: Checkpoints
) -> tuple[State, int]:
    """Returns the state of the last complete checkpoint, or a new one, and its step."""
    restored = checkpoints.restore(abstract)
    if restored is None:
        loaded = initial.load_parts(cfg, abstract, inputs.mesh)
        return init_sharded_state(cfg, inputs.mesh, loaded), 0
    state, data_state = restored
    inputs.data.set_state(data_state)
    print(f"continuing from step {int(state.step)} in {cfg.workdir}", flush=True)
    return state, int(state.step)


def run_steps(run: Run, state: State) -> State:
    """Trains the steps that are left. The order within a step is a contract (see the module)."""
    cfg, data, validation = run.cfg.train, run.inputs.data, run.validation
    first_step = int(state.step) + 1
    # SIGTERM left no time for the validation of the step that was saved.
    if validation.is_due(first_step - 1):
        validation.run(first_step - 1, state.params)
    if first_step > cfg.steps or validation.is_over:
        return state
    data.start_prefetch()
    with run.log.compiling() if run.log else contextlib.nullcontext():
        step_fn = run.step_program.result()
    pending: PendingStep | None = None
    losses: list[float] = []  # since the last checkpoint
    with contextlib.closing(Profile(cfg, Workdir(run.cfg.workdir))) as profile:
        for step in range(first_step, cfg.steps + 1):
            # The position of the batch is needed if its loss turns out not to be finite.
            data_state = data.get_state()
            batch, wait_seconds = timed_next(data)
            batch = sharding.place_own_rows(batch, run.inputs.mesh)

            profile.before(step)
            state, metrics = step_fn(state, batch)
            profile.after(step, metrics)

            # Log the previous step while the devices compute this one: reading metrics blocks.
            if pending is not None:
                losses.append(log_step(run, pending))
            pending = PendingStep(step, metrics, count_tokens(batch), wait_seconds, data_state)

            is_stopping = run.stop_signal.received()
            is_validated = validation.is_due(step) and not is_stopping
            is_saved = is_stopping or step % cfg.checkpoint_every_steps == 0 or step == cfg.steps
            # A step must be known to be finite before it is saved. The first step is logged at
            # once, because a user waits for it.
            if is_validated or is_saved or step == first_step:
                losses.append(log_step(run, pending))
                pending = None
            if is_validated:
                validation.run(step, state.params)
                is_new_best = cfg.keep_best > 0 and validation.is_best(step)
                is_saved = is_saved or is_new_best or validation.is_over
            if is_saved:
                # Process 0 alone has a log, and writes the metrics of a checkpoint.
                loss_sum = run.log.loss_sum if run.log else NO_LOSSES
                mean_loss = statistics.fmean(losses)
                scores = validation.history.scores
                run.checkpoints.save(step, state, data.get_state(), mean_loss, loss_sum, scores)
                losses = []
            if is_stopping:
                raise Preempted(
                    f"stopped by SIGTERM after step {step}, which is saved: the same command "
                    "continues it."
                )
            if validation.is_over:
                break
    return state


def compile_in_thread(cfg: Experiment, inputs: Inputs, abstract: State) -> Future:
    """Starts `compile_step`, for a state that is read or initialized meanwhile."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
    program = pool.submit(compile_step, cfg, inputs, abstract)
    pool.shutdown(wait=False)
    return program


def compile_step(
    cfg: Experiment, inputs: Inputs, abstract: State
) -> Callable[[State, Batch], tuple[State, dict]]:
    """Compiles the training step."""
    # Each thread has its own mesh.
    with jax.set_mesh(inputs.mesh):
        return compile_train_step(cfg, inputs.mesh, abstract, inputs.batch_shapes)


def timed_next(data: Iterator[Batch]) -> tuple[Batch, float]:
    """Returns the next batch and the seconds that the loop waited for it."""
    start = time.perf_counter()
    batch = next(data)
    return batch, time.perf_counter() - start


@jax.jit
def count_tokens(batch: Batch) -> tuple:
    """Returns the counts of a global batch: the first fields of `StepStats`, in their order."""
    if batch.patch_images is None:
        is_image = batch.image_mask.any(axis=1)  # (B, I)
    else:
        is_image = batch.patch_images != PADDING  # (B, P)
    examples = batch.segment_ids  # (B, S): of each token, counted from 1 in its row
    if batch.branch_ids is not None:
        examples = jnp.maximum(examples, batch.branch_ids)
    return (
        jnp.sum(batch.segment_ids != PADDING),
        batch.tokens.size,
        jnp.sum(is_image),
        is_image.size,
        jnp.sum(examples.max(axis=1)),
    )


def log_step(run: Run, pending: PendingStep) -> float:
    """Waits for the metrics of a step, checks and logs them, and returns the loss.

    Raises:
      NonFiniteStepError: the loss or the norm of the gradients is not finite.
    """
    metrics, counts = jax.device_get((pending.metrics, pending.counts))
    check_finite(pending.step, metrics, pending.data_state)
    if run.log is not None:
        stats = StepStats(*map(int, counts), pending.data_wait_seconds)
        scalars = {name: float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")}
        sources = []
        if "sources" in metrics:
            sources = np.transpose(metrics["sources"]).tolist()
        run.log.step(pending.step, scalars, stats, sources)
    return float(metrics["loss"])


def describe_batch(cfg: Experiment, tokenizer: Tokenizer, data_state: dict) -> str:
    """Names the examples of the global batch at a position in the data."""
    examples = "conversations" if cfg.data.is_conversations else "images"
    ids = pipeline.batch_ids(cfg, tokenizer, data_state)
    return f"The batch held the {examples} {', '.join(map(str, ids))}."
