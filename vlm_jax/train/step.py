"""One optimizer step, jitted over the mesh."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from flax.linen import meta

from vlm_jax import axes, sharding
from vlm_jax.config import Experiment
from vlm_jax.nn import lora
from vlm_jax.nn.models import abstract_params, initializer
from vlm_jax.nn.quantized import is_quantized, quantize
from vlm_jax.nn.vlm import VLM
from vlm_jax.runtime.process import trim_memory
from vlm_jax.structs import PADDING, Batch, State
from vlm_jax.train import optim
from vlm_jax.train.loss import Head, Nats, Params, head_cross_entropy, sum_by_source


def init_state(cfg: Experiment, key: jax.Array) -> State:
    """Returns the state of a new run, with random parameters."""
    params = cast_for_storage(cfg, meta.unbox(initializer(cfg)(key)))
    trained, _ = optim.split(params, cfg.optim)
    return State(jnp.int32(0), params, optim.optimizer(cfg).init(trained))


def init_sharded_state(
    cfg: Experiment, mesh: jax.sharding.Mesh, loaded: dict[str, jax.Array]
) -> State:
    """Returns the state of a new run on the mesh.

    Args:
      loaded: parameters by path, already on the mesh. All others are initialized on the devices
        that hold them, so that no device holds the whole model.
    """

    def without_loaded(state: State) -> State:
        flat = traverse_util.flatten_dict(state.params, sep="/")
        return state.replace(params={path: x for path, x in flat.items() if path not in loaded})

    def create(seed):
        return without_loaded(init_state(cfg, jax.random.key(seed)))

    shardings = without_loaded(state_shardings(cfg, mesh))
    state = jax.jit(create, out_shardings=shardings)(np.uint32(cfg.seed))
    return state.replace(params=traverse_util.unflatten_dict(state.params | loaded, sep="/"))


def cast_for_storage(cfg: Experiment, params):
    """Stores frozen parameters as `train.frozen_dtype`; trained ones stay in float32.

    Frozen parameters get no updates, so that they need only the precision of the forward pass.
    """
    trained, frozen = optim.split(params, cfg.optim)
    boxes = traverse_util.flatten_dict(abstract_params(cfg))
    for path, x in frozen.items():
        frozen[path] = x.astype(cfg.train.frozen_float_dtype)
        if cfg.train.quantizes_frozen and lora.takes_adapter(path, boxes[path]):
            kind, inputs = cfg.train.frozen_format, boxes[path].contracted_axes
            frozen[path] = quantize(frozen[path], kind, inputs)
    return optim.join(trained, frozen)


def cast_to_compute_dtype(cfg: Experiment, tree):
    """Casts a tree of floating-point arrays to `train.compute_dtype`.

    `Quantized` ones keep their codes.
    """
    dtype = cfg.train.compute_dtype
    return jax.tree.map(lambda x: x.astype(dtype), tree, is_leaf=is_quantized)


def state_shapes(cfg: Experiment) -> State:
    """Returns the shapes of `init_state` without computing anything."""
    params = meta.unbox(abstract_params(cfg))
    params = jax.eval_shape(functools.partial(cast_for_storage, cfg), params)
    trained, _ = optim.split(params, cfg.optim)
    optimizer_state = jax.eval_shape(optim.optimizer(cfg).init, trained)
    return State(jax.ShapeDtypeStruct((), jnp.int32), params, optimizer_state)


def state_shardings(cfg: Experiment, mesh: jax.sharding.Mesh) -> State:
    """Returns the sharding of every array of the state.

    What the optimizer keeps of a parameter is sharded like it; everything else is replicated.
    """
    shapes = state_shapes(cfg)
    params = sharding.parameter_shardings(abstract_params(cfg), mesh, shapes.params)
    sharding_of_path = traverse_util.flatten_dict(params)

    def optimizer_sharding(keys, _):
        for key in keys:
            path = getattr(key, "key", None)
            if path in sharding_of_path:
                return sharding_of_path[path]
        return sharding.replicated(mesh)

    optimizer_shardings = jax.tree_util.tree_map_with_path(optimizer_sharding, shapes.optimizer)
    return State(sharding.replicated(mesh), params, optimizer_shardings)


def abstract_state(cfg: Experiment, mesh: jax.sharding.Mesh) -> State:
    """Returns shapes and shardings of the state without computing anything."""

    def describe(shape, place):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    return jax.tree.map(describe, state_shapes(cfg), state_shardings(cfg, mesh))


def batch_loss(
    cfg: Experiment,
    trained: Params,
    frozen: Params,
    batch: Batch,
    dropout_key: jax.Array | None = None,
) -> Nats:
    """Returns the sum of the loss over scored tokens, in all and by source of a mixture.

    Everything but the output head computes in `train.compute_dtype`.

    Args:
      dropout_key: of `lora.dropout`; None: nothing is dropped.
    """
    drops = dropout_key is not None
    applied = lora.as_applied(cfg.lora, trained, drops)
    params = optim.join(cast_to_compute_dtype(cfg, applied), cast_to_compute_dtype(cfg, frozen))
    batch_in_dtype = batch.replace(images=cast_to_compute_dtype(cfg, batch.images))
    rngs = {"dropout": dropout_key} if drops else None
    hidden, _ = VLM(cfg.model).apply({"params": params}, batch_in_dtype, method="hidden", rngs=rngs)

    # The head is differentiated apart from the model: its loss and gradients are computed in
    # chunks of scored tokens, so that the logits (B, S, V) of a batch are never all in memory.
    # It gets the parameters in float32 as they are stored, not the copies in the compute dtype.
    head = output_head(cfg)
    return head_cross_entropy(
        head,
        head.select(trained),
        head.select(frozen),
        hidden,
        batch,
        cfg.train.loss_chunk,
        len(cfg.data.mixture),
    )


def output_head(cfg: Experiment) -> Head:
    """Returns the output head: the embedding table if tied, else a kernel of its own."""
    model, hidden = VLM(cfg.model), jax.ShapeDtypeStruct((1, 1, cfg.decoder.width), jnp.float32)

    def apply(params, x):
        return model.apply({"params": traverse_util.unflatten_dict(params)}, x, method="head")

    # Initializing the method alone gives the parameters that it uses.
    init = functools.partial(model.init, method="head")
    boxes = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), hidden)["params"]
    letters = {path: box.letters for path, box in traverse_util.flatten_dict(boxes).items()}
    return Head(apply, letters, cfg.decoder.vocab_size)


def accumulate(function: Callable, batch: Batch | tuple, parts: int):
    """Returns the sum of `function`, a tree of float32 arrays, over `parts` microbatches.

    Each microbatch takes every `parts`-th row, so that rows stay on their devices.
    """
    if parts == 1:
        return function(batch)

    def interleave(x):  # (B, ...) -> (parts, B / parts, ...)
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(sums, microbatch):
        microbatch = jax.tree.map(axes.constrain_rows, microbatch)
        return jax.tree.map(jnp.add, sums, function(microbatch)), None

    microbatches = jax.tree.map(interleave, batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, microbatches)[0]


def loss_and_gradients(
    cfg: Experiment,
    trained: Params,
    frozen: Params,
    batch: Batch,
    dropout_key: jax.Array | None = None,
) -> tuple[tuple[jax.Array, jax.Array | None], Params]:
    """Returns the loss in nats per scored token, and its gradients by path.

    The loss is divided by the scored tokens of the whole batch, so that microbatches with few and
    with many of them have the right weights. With it comes `Nats.by_source`, which is not divided.

    Args:
      dropout_key: of `lora.dropout`; None: nothing is dropped.
    """
    count = jnp.maximum(jnp.sum(batch.loss_weights), 1)

    def gradient(microbatch_and_rows):
        microbatch, rows = microbatch_and_rows
        key = dropout_key
        if key is not None:
            # Each microbatch drops other inputs.
            key = jax.random.fold_in(key, rows[0])

        def loss(trained):
            nats = batch_loss(cfg, trained, frozen, microbatch, key)
            return nats.total / count, nats.by_source

        return jax.value_and_grad(loss, has_aux=True)(trained)

    rows = jnp.arange(len(batch.tokens))
    return accumulate(gradient, (batch, rows), cfg.train.microbatches)


def dropout_key(cfg: Experiment, step: jax.Array) -> jax.Array | None:
    """Returns the random key of a step, the same after a resume; None without dropout."""
    if not cfg.lora.dropout:
        return None
    return jax.random.fold_in(jax.random.key(cfg.seed), step)


class ValidationSums(NamedTuple):
    """Sums over the scored tokens of a batch, in all and by source of a mixture."""

    nats: Nats
    count: jax.Array  # ()
    count_by_source: jax.Array | None  # (N,)


def validation_sums(cfg: Experiment, params, batch: Batch) -> ValidationSums:
    """Returns the sum of the loss over scored tokens, and their number."""
    trained, frozen = optim.split(params, cfg.optim)

    def sums(microbatch):
        nats = batch_loss(cfg, trained, frozen, microbatch)
        count = jnp.sum(microbatch.loss_weights, dtype=jnp.float32)
        return ValidationSums(nats, count, scored_by_source(cfg, microbatch))

    return accumulate(sums, batch, cfg.train.microbatches)


def scored_by_source(cfg: Experiment, batch: Batch) -> jax.Array | None:
    """Returns the number of scored tokens of each source, (N,) float32; None without a mixture."""
    if batch.source_ids is None:
        return None
    weights = batch.loss_weights.astype(jnp.float32)
    return sum_by_source(weights, batch.source_ids, len(cfg.data.mixture))


def jit_validation_sums(
    cfg: Experiment, mesh: jax.sharding.Mesh
) -> Callable[[Params, Batch], ValidationSums]:
    """Returns `validation_sums`, jitted over the mesh."""
    return jax.jit(functools.partial(validation_sums, cfg), out_shardings=sharding.replicated(mesh))


class SourceSums(NamedTuple):
    """Sums over the tokens of each of the N sources of a mixture in a batch."""

    nats: jax.Array  # (N,) of scored tokens
    scored_tokens: jax.Array  # (N,)
    tokens: jax.Array  # (N,) without padding


def train_step(cfg: Experiment, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """Returns the next state and the metrics of this step.

    Metrics:
      loss: nats per scored token.
      grad_norm: global norm of the gradients before clipping.
      learning_rate: of the schedule, without the `lr_mult` of a part.
      finite: path -> whether the gradient's contribution to `grad_norm` is finite.
      largest: path -> `max_abs_params` before the step, if loss or gradients are not finite.
      sources: with a mixture, `SourceSums`.
    """
    trained, frozen = optim.split(state.params, cfg.optim)
    (loss, source_nats), gradients = loss_and_gradients(
        cfg, trained, frozen, batch, dropout_key(cfg, state.step)
    )
    updates, optimizer_state = optim.optimizer(cfg).update(gradients, state.optimizer, trained)
    params = optim.join(optax.apply_updates(trained, updates), frozen)
    norm = optax.tree.norm(gradients)
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": optim.schedule(cfg.optim, cfg.train.steps)(state.step),
        "finite": {"/".join(path): _has_finite_norm(x) for path, x in gradients.items()},
        "largest": max_abs_params(trained | frozen, ~jnp.isfinite(loss + norm)),
    }
    if source_nats is not None:
        is_token = (batch.segment_ids != PADDING).astype(jnp.int32)
        tokens = sum_by_source(is_token, batch.source_ids, len(cfg.data.mixture))
        metrics["sources"] = SourceSums(source_nats, scored_by_source(cfg, batch), tokens)
    return State(state.step + 1, params, optimizer_state), metrics


def _has_finite_norm(x: jax.Array) -> jax.Array:
    return jnp.isfinite(jnp.sum(jnp.square(x)))


def max_abs_params(params: Params, is_needed: jax.Array) -> dict[str, jax.Array]:
    """Returns the largest absolute value of every parameter, by path.

    Unless `is_needed`, all are 0 and no parameter is read.
    """

    def largest(x):
        return jnp.max(x.largest if is_quantized(x) else jnp.abs(x)).astype(jnp.float32)

    def measure():
        return {"/".join(path): largest(x) for path, x in params.items()}

    def zeros():
        return {"/".join(path): jnp.float32(0) for path in params}

    return jax.lax.cond(is_needed, measure, zeros)


def jit_train_step(
    cfg: Experiment, mesh: jax.sharding.Mesh
) -> Callable[[State, Batch], tuple[State, dict]]:
    """Returns `train_step`, jitted over the mesh; the state is donated."""
    state = state_shardings(cfg, mesh)
    return jax.jit(
        functools.partial(train_step, cfg),
        in_shardings=(state, sharding.row_sharding(mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def compile_train_step(
    cfg: Experiment, mesh: jax.sharding.Mesh, state: State, batch: Batch
) -> jax.stages.Compiled:
    """Compiles `jit_train_step` for arrays, or shapes with shardings, such as these."""
    program = jit_train_step(cfg, mesh).lower(state, batch).compile()
    # The compiler's memory is returned before the first step allocates its own.
    trim_memory()
    return program
