"""The most that a training step holds at once on one device, from its traced program and without compiling it.

The step is traced as one device sees it: its rows, its share of the heads and of the MLP. Remat, dtypes, microbatches
and frozen parts need no rule of their own: they are in the program that `liveness` goes through.
"""

import math
from dataclasses import dataclass, replace

import jax
from jax.interpreters import partial_eval

from vlm_jax import axes
from vlm_jax.config import Experiment
from vlm_jax.cost.flops import token_flow
from vlm_jax.nn.decoder import empty_layers
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.vlm import example_batch
from vlm_jax.plan import liveness
from vlm_jax.structs import Batch
from vlm_jax.train import optim
from vlm_jax.train.step import state_shapes, state_shardings, train_step

# Of what comes and goes, the share that the TPU compiler leaves empty in between: so large that the four training
# configs of `configs/` and the cases of tests/plan/test_slices.py are predicted within 15 % of what it reserves.
FRAGMENTATION = 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int  # and all else that comes and goes within the step
    batch: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.batch


def predicted(cfg: Experiment, mesh: jax.sharding.AbstractMesh) -> Memory:
    """The state's and the batch's bytes as they lie on the mesh, and the peak of what a step holds besides."""
    seen = local(cfg, mesh)
    state, batch = state_shapes(seen), batch_shapes(seen)
    with jax.sharding.use_abstract_mesh(axes.single_device_mesh(mesh)):
        program = jax.make_jaxpr(lambda state, batch: train_step(seen, state, batch))(
            state, batch
        ).jaxpr
    program, _ = partial_eval.dce_jaxpr(
        program, [True] * len(program.outvars)
    )  # XLA drops what nobody reads, too
    split = _splits(seen, mesh)
    peak = liveness.peak_bytes(program, lambda shape: split.get(shape, 1))
    if mesh.abstract_device and mesh.abstract_device.platform == "tpu":
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


def _only_used(used: list[bool], equation):
    """A barrier keeps what is read of it: JAX's dead-code elimination would keep all, where XLA does not."""
    kept = [i for i, is_used in enumerate(used) if is_used]
    if not kept:
        return [False] * len(used), None
    invars, outvars = ([values[i] for i in kept] for values in (equation.invars, equation.outvars))
    return used, equation.replace(invars=invars, outvars=outvars)


partial_eval.dce_rules[jax.lax.optimization_barrier_p] = _only_used


def cache_bytes(cfg: Experiment) -> int:
    """Keys and values of one row while it is decoded, in float32: of its tokens, and of images that are read."""
    decoder = cfg.decoder
    layers = jax.eval_shape(lambda: empty_layers(decoder, cfg.fusion, 1, cfg.row_length))
    names = [name for block in cfg.fusion.sublayers(decoder.depth) for name in block]
    of_images = (
        2
        * names.count("cross")
        * token_flow(cfg).memory
        * decoder.num_kv_heads
        * decoder.head_width
        * 4
    )
    return of_images + sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(layers))


def local(cfg: Experiment, mesh) -> Experiment:
    """The experiment as one device sees it; a size that the mesh does not divide stays whole, as in `axes`."""
    tensor = mesh.shape["tensor"]
    rows = cfg.train.batch_size // axes.row_shards(mesh)

    def share(size: int) -> int:
        return size // tensor if size % tensor == 0 else size

    def narrow(stack):
        heads = {
            "heads": share(stack.heads),
            "kv_heads": share(stack.num_kv_heads),
            "head_dim": stack.head_width,
        }
        return replace(stack, **heads, mlp_width=share(stack.mlp_width))

    decoder = replace(narrow(cfg.decoder), vocab_size=share(cfg.decoder.vocab_size))
    return replace(
        cfg,
        decoder=decoder,
        vision=narrow(cfg.vision) if cfg.vision.kind == "vit" else cfg.vision,
        train=replace(cfg.train, batch_size=rows),
    )


def batch_shapes(cfg: Experiment) -> Batch:
    """Shapes of a training batch whose rows have as many images as they have room for."""
    sizes = cfg.row_length, cfg.train.batch_size, cfg.data.images_per_row
    return jax.eval_shape(lambda: example_batch(cfg.model, *sizes))


def _splits(cfg: Experiment, mesh) -> dict[tuple[int, ...], int]:
    """Shape of a parameter, and so of its gradient and moments -> devices along `fsdp` that share one."""
    found = {}
    for box in jax.tree.leaves(
        abstract_params(cfg), is_leaf=lambda x: isinstance(x, axes.Partitioned)
    ):
        spec = axes.parameter_spec(box.letters, box.value.shape, mesh)
        found[box.value.shape] = mesh.shape["fsdp"] if "fsdp" in spec else 1
    return found


def _bytes(shapes, shardings) -> int:
    sizes = jax.tree.map(
        lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize,
        shapes,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
