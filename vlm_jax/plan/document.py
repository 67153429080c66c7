"""Plans as plain data: the output of `--json`, and the input of `table`."""

import dataclasses
import math
from collections import Counter

import jax
from flax import traverse_util
from jax.sharding import AbstractMesh

from vlm_jax import axes
from vlm_jax.config import Experiment
from vlm_jax.cost.chips import Chip, parse_slice
from vlm_jax.cost.flops import flops_by_part, token_flow, train_flops
from vlm_jax.hub.export import exportable
from vlm_jax.nn import lora
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import PARTS, find_part, trained_paths
from vlm_jax.nn.quantized import is_quantized
from vlm_jax.plan import compiled, memory
from vlm_jax.plan.hlo import Program
from vlm_jax.plan.roofline import roofline
from vlm_jax.train.inputs import check_rows
from vlm_jax.train.step import state_shapes


def build_plan(
    cfg: Experiment, topology: str | None = None, devices: int = 1, is_compiled: bool = True
) -> dict:
    """Returns the plan of an experiment for `devices` devices or for a TPU slice.

    Args:
      topology: slice such as "v5e:8x8", instead of `devices`.
      is_compiled: compile the step for the slice.

    Raises:
      ConfigError: the mesh or the batch does not fit the devices, or the slice or its compiler is
        unknown.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology is not None:
        tpus = compiled.tpu_devices(topology)
        sizes = cfg.mesh.sizes(len(tpus))
        mesh = axes.make_mesh(cfg.mesh, tpus).abstract_mesh
    else:
        sizes = cfg.mesh.sizes(devices)
        mesh = AbstractMesh(sizes, axes.MESH_AXES)
    check_rows(cfg, mesh)
    lora.check_ranks(cfg.lora, traverse_util.flatten_dict(abstract_params(cfg)))
    predicted = memory.predict_memory(cfg, mesh)
    plan = {
        "mesh": dict(zip(axes.MESH_AXES, sizes)),
        "rows": cfg.train.batch_size,
        "parts": part_costs(cfg),
        "tokens": dataclasses.asdict(token_flow(cfg)),
        "train_flops": train_flops(cfg),
        "bytes_per_device": dataclasses.asdict(predicted) | {"total": predicted.total},
        "cache_bytes_per_row": memory.cache_bytes(cfg),
        "export": exportable(cfg).removeprefix("export: "),
    }
    if topology is None:
        return plan
    chip, chips = parse_slice(topology)
    plan["topology"] = {
        "name": topology,
        "devices": chips,
        "hbm_bytes": chip.hbm_bytes,
        "fits": predicted.total <= chip.hbm_bytes,
    }
    if is_compiled:
        plan["topology"] |= _compiled_step(cfg, chip, tpus, plan["train_flops"])
    return plan


def part_costs(cfg: Experiment) -> dict[str, dict]:
    """Parameters, trained and quantized ones, and FLOPs per step of every part of the model."""
    flat = traverse_util.flatten_dict(state_shapes(cfg).params)
    is_trained = trained_paths(flat, cfg.optim)
    count, trained, quantized = Counter(), Counter(), Counter()
    for path, x in flat.items():
        part, size = find_part(path), math.prod(x.shape)
        count[part] += size
        trained[part] += size if path in is_trained else 0
        quantized[part] += size if is_quantized(x) else 0
    flops = flops_by_part(cfg)
    return {
        part: {
            "parameters": count[part],
            "trained_parameters": trained[part],
            "quantized_parameters": quantized[part],
            "forward_flops": flops[part].forward,
            "backward_flops": flops[part].backward,
        }
        for part in PARTS
        if count[part]
    }


def _compiled_step(
    cfg: Experiment, chip: Chip, devices: list[jax.Device], model_flops: float
) -> dict:
    step = compiled.compile_step(cfg, axes.make_mesh(cfg.mesh, devices))
    result = {
        "compile_seconds": step.compile_seconds,
        "compiled_bytes": step.hbm_bytes,
        "fits": step.fits,
    }
    if not step.fits:
        return result
    return result | speed(cfg, chip, step.program, len(devices), model_flops)


def speed(cfg: Experiment, chip: Chip, program: Program, devices: int, model_flops: float) -> dict:
    """Costs of a step on one of `devices` chips, and the throughput of all chips together."""
    limits = roofline(program, chip, cfg.train.compute_dtype)
    rows, tokens = cfg.train.batch_size, token_flow(cfg)
    peak_flops_per_second = devices * chip.flops_per_second(cfg.train.compute_dtype)

    def throughput(seconds: float) -> dict:
        return {
            "step_seconds": seconds,
            "mfu": model_flops / (peak_flops_per_second * seconds),
            "tokens_per_second": rows * tokens.sequence / seconds,
            "images_per_second": rows * tokens.images / seconds,
        }

    collectives = sorted(program.collectives, key=lambda x: -x.sent_bytes * x.times)
    return {
        "xla_flops": program.flops * devices,
        "moved_bytes": program.hbm_bytes,
        "collectives": [dataclasses.asdict(x) | {"sent_bytes": x.sent_bytes} for x in collectives],
        "roofline_seconds": dataclasses.asdict(limits),
        "overlapped": throughput(limits.overlapped),
        "serial": throughput(limits.serial),
    }
