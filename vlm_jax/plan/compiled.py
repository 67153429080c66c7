"""The real training step, compiled ahead of time for a slice of TPUs that is not there."""

import importlib.util
import logging
import math
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental import topologies

from vlm_jax import axes, sharding
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.cost.chips import parse_slice
from vlm_jax.plan import hlo
from vlm_jax.plan.memory import batch_shapes
from vlm_jax.train.loss import chunk_tokens
from vlm_jax.train.step import abstract_state, jit_train_step


@dataclass(frozen=True)
class Compiled:
    compile_seconds: float
    hbm_bytes: int  # on a device, at the peak; as far as the compiler tells where it does not fit
    code_bytes: int  # of the program itself, contained in hbm_bytes
    fits: bool
    program: hlo.Program | None  # None where it does not fit


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a slice, as the TPU compiler knows them.

    Raises:
      ConfigError: the compiler is not installed, or there is no such slice.
    """
    chip, chips = parse_slice(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology needs XLA's TPU compiler: pip install -r requirements-tpu.txt."
        )
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # a lock file is for those who hold chips
    # Without these it asks a metadata server, which is only on TPU VMs, and logs that there is none.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault(
        "TPU_ACCELERATOR_TYPE", "v5litepod-8"
    )  # any that exists: the topology is given
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    hosts = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}  # by default a host has four
    if chip.name == "v4":
        hosts["chip_config_name"] = (
            "megacore"  # as TPU VMs run it; else each of its two cores is a device
        )
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **hosts).devices


def compile_step(cfg: Experiment, mesh: jax.sharding.Mesh) -> Compiled:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as reports:
        try:
            program = lowered(cfg, mesh).compile(compiler_options={"xla_dump_to": reports})
        except jax.errors.JaxRuntimeError as error:
            used = re.search(r"(?:Used |temporaries \()([\d.]+)([MGT])", str(error))
            if used is None:
                raise
            size = int(float(used[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[used[2]])
            return Compiled(time.perf_counter() - start, size, 0, False, None)
        reserved = reserved_bytes(Path(reports))
    seconds, code = (
        time.perf_counter() - start,
        program.memory_analysis().generated_code_size_in_bytes,
    )
    return Compiled(
        seconds,
        reserved + code,
        code,
        True,
        hlo.read(program.as_text(), mesh.size, loss_turns(cfg, mesh)),
    )


def reserved_bytes(reports: Path) -> int:
    """HBM for all that goes in, comes out and lies in between, from the report that XLA writes about it.

    The temporaries of `memory_analysis()` are up to a third more than XLA lays out (libtpu 0.0.42): of a program that
    fits 15.75 GiB it says 19.1.
    """
    (report,) = reports.glob("*memory-usage-report.txt")
    return int(re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report.read_text())[1])


def lowered(cfg: Experiment, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Nothing is put on a device: shapes and shardings are all that is needed."""
    rows = sharding.row_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch_shapes(cfg)
    )
    with jax.set_mesh(mesh):
        return jit_train_step(cfg, mesh).lower(abstract_state(cfg, mesh), batch)


def loss_turns(cfg: Experiment, mesh: jax.sharding.Mesh) -> int:
    """Chunks of the loss on a device in one microbatch, if all text of a row is scored."""
    rows = cfg.train.batch_size // axes.row_shards(mesh)
    rows //= cfg.train.microbatches
    chunk = chunk_tokens(rows * cfg.row_length, cfg.decoder.vocab_size, cfg.train.loss_chunk)
    return math.ceil(rows * cfg.data.text_length / chunk)
