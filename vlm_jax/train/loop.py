"""The one training loop. Its order is a contract:

    next batch -> step -> log the step before -> (when due) check and save -> next batch ...

The step before is looked at while the device works on this one, so that it never waits. A loss that is not finite stops
the run before anything of it is saved.
"""

import math

import jax
import numpy as np

from vlm_jax import axes
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data import pipeline, text
from vlm_jax.data.text import Tokenizer
from vlm_jax.hub import compose
from vlm_jax.hub.tokenizer import HubTokenizer
from vlm_jax.structs import PADDING, Batch, State
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.log import Log
from vlm_jax.train.step import abstract_state, compiled_step, make_state, state_shardings
from vlm_jax.workdir import Workdir


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


def train(cfg: Experiment) -> State:
    """Trains in `cfg.workdir`, from its last checkpoint if it has one, and returns the last state.

    Raises:
      ConfigError: the batch does not fit the devices, the config does not fit the data, or the work folder is another
        run's; nothing is written then.
      NotFinite: the loss is not finite; the last checkpoint stays.
    """
    mesh = axes.make_mesh(cfg.mesh)
    check_rows(cfg, mesh)
    workdir = Workdir(cfg.workdir)
    workdir.check(cfg)
    tokenizer = tokenizer_of(cfg, workdir)
    data = pipeline.training_iterator(cfg, tokenizer, jax.process_index(), jax.process_count())
    check_data(cfg, tokenizer, data)
    workdir.open(cfg)
    if not workdir.tokenizer.exists():
        tokenizer.save(workdir.tokenizer)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir.checkpoints, cfg.train)
        state, start = begin(cfg, mesh, data, checkpoints)
        log = Log(workdir, start, cfg.train.steps, cfg.train.log_every_steps)
        try:
            return run_steps(cfg, mesh, state, data, checkpoints, log)
        finally:
            log.close()
            checkpoints.close()


def check_rows(cfg: Experiment, mesh: jax.sharding.Mesh) -> None:
    shards = math.prod(mesh.shape[axis] for axis in axes.ROWS)
    if cfg.train.batch_size % shards:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not divisible by the {shards} devices of mesh.data x "
            f"mesh.fsdp: choose a multiple of {shards}."
        )


def check_data(cfg: Experiment, tokenizer: Tokenizer, data) -> None:
    """Makes the first batch and measures every question: a mistake must not show in the midst of the training."""
    text.pack_row(cfg, [pipeline.longest_pair(cfg, tokenizer)])
    asked = pipeline.questions(cfg, cfg.eval.split, cfg.eval.max_examples)
    pipeline.prompt_length(cfg, tokenizer, [question.question for question in asked])
    first = data.get_state()
    next(data)
    data.set_state(first)


def tokenizer_of(cfg: Experiment, workdir: Workdir) -> Tokenizer:
    """The tokenizer that is kept in the work folder, or one trained now."""
    if workdir.tokenizer.exists():
        return Tokenizer.load(workdir.tokenizer, cfg.data.special_ids)
    if cfg.decoder.checkpoint:
        return Tokenizer(HubTokenizer.load(cfg.decoder.checkpoint).backend, cfg.data.special_ids)
    return pipeline.train_tokenizer(cfg)


def begin(cfg: Experiment, mesh, data, checkpoints: Checkpoints) -> tuple[State, int]:
    """A new state, every parameter made where it lies, or that of the last whole checkpoint; and its step."""
    restored = checkpoints.restore(abstract_state(cfg, mesh))
    if restored is None:
        create = jax.jit(lambda key: make_state(cfg, key), out_shardings=state_shardings(cfg, mesh))
        state = create(jax.random.key(cfg.seed))
        return state.replace(params=compose.load_parts(cfg, state.params, mesh)), 0
    state, data_state = restored
    data.set_state(data_state)
    print(f"continuing from step {int(state.step)} in {cfg.workdir}", flush=True)
    return state, int(state.step)


def run_steps(cfg: Experiment, mesh, state: State, data, checkpoints: Checkpoints, log: Log) -> State:
    """The steps that are left, in the order that the module states."""
    step_fn, rows = compiled_step(cfg, mesh), axes.row_sharding(mesh)
    before = None
    for step in range(int(state.step) + 1, cfg.train.steps + 1):
        batch = next(data)
        on_device = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)
        state, metrics = step_fn(state, on_device)
        if before is not None:
            note(log, *before)
        before = (step, metrics, batch)
        if step % cfg.train.checkpoint_every_steps == 0 or step == cfg.train.steps:
            note(log, *before)
            before = None
            checkpoints.save(step, state, data.get_state())
    return state


def note(log: Log, step: int, metrics: dict, batch: Batch) -> None:
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise NotFinite(f"step {step}: the {name} is {metrics[name]}; the last checkpoint is kept.")
    tokens, examples = np.sum(batch.segment_ids != PADDING), np.sum(batch.branch_ids.max(axis=1))
    log.step(step, metrics, int(tokens) * jax.process_count(), int(examples) * jax.process_count())
