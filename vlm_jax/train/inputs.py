"""Inputs of a run: everything that is built and checked before its work folder is written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
from flax import traverse_util

from vlm_jax import axes, sharding
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.cost.flops import train_flops
from vlm_jax.cost.peak_flops import peak_flops_per_second
from vlm_jax.data import length_check, pipeline
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.nn import lora
from vlm_jax.nn.models import abstract_params
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.structs import Batch
from vlm_jax.train import initial, optim, trackers


@dataclass(frozen=True)
class Inputs:
    """Mesh, tokenizer and data of a run, checked."""

    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    data: Iterator[Batch]  # with `get_state` and `set_state`
    batch_shapes: Batch  # shapes and shardings of the global batch
    fingerprint: Mapping[str, str]  # of the data
    data_counts: Mapping[str, int]  # of conversations that are cut or left out
    seconds_at_peak: float | None  # of a step; None: unknown devices


def prepare(cfg: Experiment, workdir: Workdir) -> Inputs:
    """Builds the inputs of a run and checks them; writes nothing.

    Raises:
      ConfigError: see `loop.train`.
    """
    optim.check_kind(cfg.optim)
    trackers.check_trackers(cfg.train.trackers)
    lora.check_ranks(cfg.lora, traverse_util.flatten_dict(abstract_params(cfg)))
    mesh = axes.make_mesh(cfg.mesh)
    check_rows(cfg, mesh)
    workdir.check(cfg)
    tokenizer = initial.load_tokenizer(cfg)
    data = pipeline.training_iterator(cfg, tokenizer, *sharding.share_of_rows(mesh))
    fingerprint = pipeline.contents(cfg, tokenizer)
    workdir.check_data(fingerprint)
    first_batch = check_data(cfg, tokenizer, data)
    batch_shapes = sharding.abstract_own_rows(first_batch, mesh)
    return Inputs(
        mesh,
        tokenizer,
        data,
        batch_shapes,
        fingerprint,
        pipeline.data_counts(cfg, tokenizer),
        seconds_at_peak(cfg, mesh),
    )


def open_workdir(cfg: Experiment, workdir: Workdir, inputs: Inputs) -> None:
    """Writes the config, the fingerprint of the data, and the tokenizer of a run."""
    workdir.open(cfg)
    workdir.keep_data(inputs.fingerprint)
    with workdir.writing():
        if not workdir.tokenizer.exists():
            inputs.tokenizer.save(workdir.tokenizer)
        initial.keep_processor(cfg, workdir)


def seconds_at_peak(cfg: Experiment, mesh: jax.sharding.Mesh) -> float | None:
    """Returns the seconds of a step at the devices' peak matmul throughput; None: unknown."""
    peak = peak_flops_per_second(cfg.train.compute_dtype)
    if peak is None:
        return None
    # On the mesh of the parameters' initialization, so that it is traced once for both.
    with jax.set_mesh(mesh):
        return train_flops(cfg) / peak


def check_rows(cfg: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError if devices and microbatches do not divide the batch."""
    shards, microbatches = axes.row_shards(mesh), cfg.train.microbatches
    parts = shards * microbatches
    if cfg.train.batch_size % parts:
        times = f" times train.microbatches {microbatches}" if microbatches > 1 else ""
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not divisible by the {shards} devices of "
            f"mesh.data x mesh.fsdp{times}: choose a multiple of {parts}."
        )


def check_data(cfg: Experiment, tokenizer: Tokenizer, data) -> Batch:
    """Measures every question and returns the first batch, without taking it from `data`.

    Errors of the data must not appear in the middle of the training. The first process prints how
    many questions do not fit their rows, if any.
    """
    length_check.check_lengths(cfg, tokenizer)
    if jax.process_index() == 0:
        message = length_check.dropped_questions_message(cfg, tokenizer)
        if message:
            print(message, flush=True)
    data_state = data.get_state()
    first_batch = next(data)
    data.set_state(data_state)
    return first_batch
