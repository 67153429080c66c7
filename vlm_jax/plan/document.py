"""A plan as plain numbers: what `--json` prints and what `table` writes out."""

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
from vlm_jax.nn.parts import PARTS, part_of, trained_parts
from vlm_jax.plan import compiled, memory
from vlm_jax.plan.hlo import Program
from vlm_jax.plan.roofline import roofline
from vlm_jax.train.inputs import check_rows
from vlm_jax.train.step import state_shapes


def make(
    cfg: Experiment, topology: str | None = None, devices: int = 1, is_compiled: bool = True
) -> dict:
    """The plan of an experiment for `devices` devices, or for a slice of TPUs, compiled for it if `is_compiled`.

    Raises:
      ConfigError: the mesh or the batch does not fit the devices, or the slice or its compiler is unknown.
    """
    jax.config.update("jax_platforms", "cpu")
    places = compiled.devices_of(topology) if topology is not None else None
    sizes = cfg.mesh.sizes(len(places) if places else devices)
    abstract = (
        axes.make_mesh(cfg.mesh, places).abstract_mesh
        if places
        else AbstractMesh(sizes, axes.MESH_AXES)
    )
    check_rows(cfg, abstract)
    held = memory.predicted(cfg, abstract)
    document = {
        "mesh": dict(zip(axes.MESH_AXES, sizes)),
        "rows": cfg.train.batch_size,
        "parts": parts(cfg),
        "tokens": dataclasses.asdict(token_flow(cfg)),
        "train_flops": train_flops(cfg),
        "bytes_per_device": dataclasses.asdict(held) | {"total": held.total},
        "cache_bytes_per_row": memory.cache_bytes(cfg),
        "export": exportable(cfg).removeprefix("export: "),
    }
    if places:
        chip, chips = parse_slice(topology)
        room = chip.hbm_bytes
        document["topology"] = {
            "name": topology,
            "devices": chips,
            "hbm_bytes": room,
            "fits": held.total <= room,
        }
        if is_compiled:
            document["topology"] |= _compiled(cfg, chip, places, document["train_flops"])
    return document


def parts(cfg: Experiment) -> dict[str, dict]:
    """Parameters of every part of the model, whether they are trained, and the FLOPs of a step."""
    flat = traverse_util.flatten_dict(state_shapes(cfg).params)
    count = Counter()
    for path, x in flat.items():
        count[part_of(path)] += math.prod(x.shape)
    trained, flops = trained_parts(cfg.optim), flops_by_part(cfg)
    return {
        part: {
            "parameters": count[part],
            "trained": part in trained,
            "forward_flops": flops[part].forward,
            "backward_flops": flops[part].backward,
        }
        for part in PARTS
        if count[part]
    }


def _compiled(cfg: Experiment, chip: Chip, places: list, model_flops: float) -> dict:
    found = compiled.compile_step(cfg, axes.make_mesh(cfg.mesh, places))
    result = {
        "compile_seconds": found.compile_seconds,
        "compiled_bytes": found.hbm_bytes,
        "fits": found.fits,
    }
    if not found.fits:
        return result
    return result | speed(cfg, chip, found.program, len(places), model_flops)


def speed(cfg: Experiment, chip: Chip, program: Program, devices: int, model_flops: float) -> dict:
    """What a step takes on each of `devices` chips, and what they do in a second together."""
    limits = roofline(program, chip, cfg.train.compute_dtype)
    rows, tokens = cfg.train.batch_size, token_flow(cfg)

    def at(seconds: float) -> dict:
        return {
            "step_seconds": seconds,
            "mfu": model_flops
            / (devices * chip.flops_per_second(cfg.train.compute_dtype) * seconds),
            "tokens_per_second": rows * tokens.sequence / seconds,
            "images_per_second": rows * tokens.images / seconds,
        }

    return {
        "xla_flops": program.flops * devices,
        "moved_bytes": program.hbm_bytes,
        "collectives": [
            dataclasses.asdict(collective) | {"sent_bytes": collective.sent_bytes}
            for collective in sorted(program.collectives, key=lambda x: -x.sent_bytes * x.times)
        ],
        "roofline_seconds": dataclasses.asdict(limits),
        "overlapped": at(limits.overlapped),
        "serial": at(limits.serial),
    }
