"""Compiles the train step ahead of time for a TPU slice, without TPUs."""

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

# Messages of the TPU compiler about a program that does not fit.
USED_MEMORY = re.compile(r"(?:Used |temporaries \()(?P<size>[\d.]+)(?P<unit>[MGT])")
UNIT_BYTES = {"M": 2**20, "G": 2**30, "T": 2**40}
# The line of its memory report for everything in HBM.
TOTAL_BYTES = re.compile(r"Memory Space: default .*\nTotal bytes: (?P<bytes>\d+)")


@dataclass(frozen=True)
class Compiled:
    compile_seconds: float
    hbm_bytes: int  # peak on one device; if the program does not fit, as the compiler reports it
    code_bytes: int  # of the program itself, included in hbm_bytes
    fits: bool
    program: hlo.Program | None  # None if it does not fit


def tpu_devices(topology: str) -> list[jax.Device]:
    """Returns the abstract devices of a slice, such as "v5e:8x8".

    Raises:
      ConfigError: the TPU compiler is not installed, or the slice does not exist.
    """
    chip, chips = parse_slice(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology needs XLA's TPU compiler: pip install -r requirements-tpu.txt."
        )
    # libtpu's lock file protects real chips.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Otherwise libtpu queries a metadata server, which exists only on TPU VMs, and logs an error.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Any existing type: the topology below overrides it.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    options = {}
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # default: four chips per host
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # as on TPU VMs: both cores are one device
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def compile_step(cfg: Experiment, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles the train step and analyzes the program."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as reports:
        try:
            program = lower_train_step(cfg, mesh).compile(compiler_options={"xla_dump_to": reports})
        except jax.errors.JaxRuntimeError as error:
            used = USED_MEMORY.search(str(error))
            if used is None:
                raise
            size = int(float(used["size"]) * UNIT_BYTES[used["unit"]])
            return Compiled(time.perf_counter() - start, size, 0, fits=False, program=None)
        reserved = reported_hbm_bytes(Path(reports))
    seconds = time.perf_counter() - start
    code = program.memory_analysis().generated_code_size_in_bytes
    analyzed = hlo.analyze(program.as_text(), mesh.size, loss_chunks(cfg, mesh))
    return Compiled(seconds, reserved + code, code, fits=True, program=analyzed)


def reported_hbm_bytes(reports: Path) -> int:
    """HBM of arguments, results and temporaries, from XLA's memory usage report.

    The temporaries of `memory_analysis()` are up to a third more than XLA allocates (libtpu
    0.0.42): for a program that fits 15.75 GiB it returns 19.1.
    """
    (report,) = reports.glob("*memory-usage-report.txt")
    return int(TOTAL_BYTES.search(report.read_text())["bytes"])


def lower_train_step(cfg: Experiment, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lowers the train step from shapes and shardings, without arrays on a device."""
    rows = sharding.row_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch_shapes(cfg)
    )
    with jax.set_mesh(mesh):
        return jit_train_step(cfg, mesh).lower(abstract_state(cfg, mesh), batch)


def loss_chunks(cfg: Experiment, mesh: jax.sharding.Mesh) -> int:
    """Chunks of the loss per device and microbatch, if all text tokens are scored."""
    rows = cfg.train.batch_size // axes.row_shards(mesh)
    rows //= cfg.train.microbatches
    chunk = chunk_tokens(rows * cfg.row_length, cfg.decoder.num_logits, cfg.train.loss_chunk)
    return math.ceil(rows * cfg.data.text_length / chunk)
