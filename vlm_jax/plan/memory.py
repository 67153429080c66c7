"""Predicts the peak memory per device of a train step from its jaxpr, without compiling.

The step is traced with the shapes of one device: its rows, its share of the heads and of the MLP.
Remat, dtypes, microbatches and frozen parts need no special cases: they are part of the program
that `liveness` analyzes.
"""

import math
from dataclasses import dataclass, replace

import jax
from jax.interpreters import partial_eval

from vlm_jax import axes
from vlm_jax.config import Experiment
from vlm_jax.cost.flops import token_flow
from vlm_jax.data.batching import row_layout
from vlm_jax.nn.decoder import empty_layers
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.vlm import example_batch
from vlm_jax.plan import liveness
from vlm_jax.structs import Batch
from vlm_jax.train import optim
from vlm_jax.train.step import state_shapes, state_shardings, train_step

# Share of the temporaries that the TPU compiler loses to gaps. With this value, the predictions for
# the training configs in `configs/tpu` and for tests/plan/test_slices.py are within 15 % of what it
# reserves.
FRAGMENTATION = 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int  # and all other temporaries of the step
    batch: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.batch


def predict_memory(cfg: Experiment, mesh: jax.sharding.AbstractMesh) -> Memory:
    """Returns the bytes of the sharded state and batch, and the peak of a step's temporaries."""
    device_cfg = per_device_config(cfg, mesh)
    state, batch = state_shapes(device_cfg), batch_shapes(device_cfg)
    with jax.sharding.use_abstract_mesh(axes.single_device_mesh(mesh)):
        step = jax.make_jaxpr(lambda state, batch: train_step(device_cfg, state, batch))
        program = step(state, batch).jaxpr
    # XLA eliminates dead code as well.
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    split = _splits(device_cfg, mesh)
    is_tpu = bool(mesh.abstract_device) and mesh.abstract_device.platform == "tpu"
    summed_parts = axes.SUMMED_PARTS if mesh.shape["tensor"] == 1 else 1
    target = liveness.Target(lambda shape: split.get(shape, 1), is_tpu, summed_parts)
    peak = liveness.peak_bytes(program, target)
    if is_tpu:
        peak *= 1 + FRAGMENTATION
    shardings, shapes = state_shardings(cfg, mesh), state_shapes(cfg)
    trained = optim.split(shapes.params, cfg.optim)[0]
    gradients = _bytes(trained, optim.split(shardings.params, cfg.optim)[0])
    return Memory(
        parameters=_bytes(shapes.params, shardings.params),
        optimizer=_bytes(shapes.optimizer, shardings.optimizer),
        gradients=gradients,
        activations=max(0, int(peak) - gradients),
        batch=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(batch)),
    )


def _drop_unused(used: list[bool], equation):
    """Drops the unused values of a barrier, as XLA does; by default JAX keeps all of them."""
    if not any(used):
        return [False] * len(used), None
    invars = [var for var, is_used in zip(equation.invars, used) if is_used]
    outvars = [var for var, is_used in zip(equation.outvars, used) if is_used]
    return used, equation.replace(invars=invars, outvars=outvars)


partial_eval.dce_rules[jax.lax.optimization_barrier_p] = _drop_unused


def cache_bytes(cfg: Experiment) -> int:
    """Float32 KV cache of one row: of its tokens, and of the image tokens of cross-attention."""
    decoder = cfg.decoder
    layers = jax.eval_shape(lambda: empty_layers(decoder, cfg.fusion, 1, cfg.row_length))
    text_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(layers))
    names = [name for block in cfg.fusion.sublayers(decoder.depth) for name in block]
    per_token_bytes = 2 * decoder.num_kv_heads * decoder.head_width * 4
    return text_bytes + names.count("cross") * token_flow(cfg).memory * per_token_bytes


def per_device_config(cfg: Experiment, mesh) -> Experiment:
    """The experiment with the shapes of one device.

    A size that the mesh does not divide is replicated, as in `axes`.
    """
    tensor = mesh.shape["tensor"]
    rows = cfg.train.batch_size // axes.row_shards(mesh)
    cfg = replace(cfg, train=replace(cfg.train, batch_size=rows))
    if tensor == 1:
        # The same model, whose parameters are traced already.
        return cfg

    def share(size: int) -> int:
        return size // tensor if size % tensor == 0 else size

    def narrow(stack):
        return replace(
            stack,
            heads=share(stack.heads),
            kv_heads=share(stack.num_kv_heads),
            head_dim=stack.head_width,
            mlp_width=share(stack.mlp_width),
        )

    decoder = replace(narrow(cfg.decoder), vocab_size=share(cfg.decoder.vocab_size))
    vision = narrow(cfg.vision) if cfg.vision.has_encoder else cfg.vision
    return replace(cfg, decoder=decoder, vision=vision)


def batch_shapes(cfg: Experiment) -> Batch:
    """Shapes of a training batch whose rows have as many images as they have room for."""
    sizes = cfg.row_length, cfg.train.batch_size, cfg.data.images_per_row, cfg.patches_per_row
    batch = jax.eval_shape(lambda: example_batch(cfg.model, *sizes))
    batch = batch.replace(layout=row_layout(cfg.data))
    return batch.replace(source_ids=batch.tokens) if cfg.data.mixture else batch


def _splits(cfg: Experiment, mesh) -> dict[tuple[int, ...], int]:
    """Returns parameter shape -> number of devices along `fsdp` that share such an array.

    Gradients and moments have the shapes of their parameters.
    """
    boxes = jax.tree.leaves(abstract_params(cfg), is_leaf=lambda x: isinstance(x, axes.Partitioned))
    splits = {}
    for box in boxes:
        spec = axes.parameter_spec(box.letters, box.value.shape, mesh)
        splits[box.value.shape] = mesh.shape["fsdp"] if "fsdp" in spec else 1
    return splits


def _bytes(shapes, shardings) -> int:
    sizes = jax.tree.map(
        lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize,
        shapes,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
