"""One optimizer step, jitted over the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from flax.linen import meta

from vlm_jax import axes
from vlm_jax.config import Experiment
from vlm_jax.nn.models import abstract_params, initializer
from vlm_jax.nn.vlm import VLM
from vlm_jax.runtime.process import trim_memory
from vlm_jax.structs import Batch, State
from vlm_jax.train import optim
from vlm_jax.train.loss import Head, Params, head_cross_entropy


def init_state(cfg: Experiment, key: jax.Array) -> State:
    """A new run's state, all at random; `init_sharded_state` jits it so that every parameter is created where it lies."""
    params = stored(cfg, meta.unbox(initializer(cfg)(key)))
    trained, _ = optim.split(params, cfg.optim)
    return State(jnp.int32(0), params, optim.optimizer(cfg.optim, cfg.train.steps).init(trained))


def init_sharded_state(
    cfg: Experiment, mesh: jax.sharding.Mesh, loaded: dict[str, jax.Array]
) -> State:
    """A new run's state with the parameters that are `loaded` (by their paths); the others are made, where they lie."""

    def without_loaded(state: State) -> State:
        flat = traverse_util.flatten_dict(state.params, sep="/")
        return state.replace(params={path: x for path, x in flat.items() if path not in loaded})

    shardings = without_loaded(state_shardings(cfg, mesh))
    create = jax.jit(
        lambda seed: without_loaded(init_state(cfg, jax.random.key(seed))), out_shardings=shardings
    )
    state = create(np.uint32(cfg.seed))
    return state.replace(params=traverse_util.unflatten_dict(state.params | loaded, sep="/"))


def stored(cfg: Experiment, params):
    """Parameters as a run keeps them: in float32, frozen ones in the compute dtype, since nothing is added to them."""
    trained, frozen = optim.split(params, cfg.optim)
    return optim.join(trained, cast_to_compute_dtype(cfg, frozen))


def cast_to_compute_dtype(cfg: Experiment, tree):
    """A tree of floating-point arrays in the compute dtype."""
    return jax.tree.map(lambda x: x.astype(cfg.train.compute_dtype), tree)


def state_shapes(cfg: Experiment) -> State:
    """Shapes of what `init_state` makes."""
    params = jax.eval_shape(lambda params: stored(cfg, params), meta.unbox(abstract_params(cfg)))
    trained, _ = optim.split(params, cfg.optim)
    optimizer = jax.eval_shape(optim.optimizer(cfg.optim, cfg.train.steps).init, trained)
    return State(jax.ShapeDtypeStruct((), jnp.int32), params, optimizer)


def state_shardings(cfg: Experiment, mesh: jax.sharding.Mesh) -> State:
    """Where every array of the state lies: what the optimizer keeps of a parameter as the parameter, the rest whole."""
    params = axes.parameter_shardings(abstract_params(cfg), mesh)
    of_path = traverse_util.flatten_dict(params)

    def optimizer_sharding(keys, _):
        found = [of_path[key.key] for key in keys if getattr(key, "key", None) in of_path]
        return found[0] if found else axes.replicated(mesh)

    optimizer = jax.tree_util.tree_map_with_path(optimizer_sharding, state_shapes(cfg).optimizer)
    return State(axes.replicated(mesh), params, optimizer)


def abstract_state(cfg: Experiment, mesh: jax.sharding.Mesh) -> State:
    """Shapes and shardings of the state, without making it."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        state_shapes(cfg),
        state_shardings(cfg, mesh),
    )


def batch_loss(cfg: Experiment, trained: Params, frozen: Params, batch: Batch) -> jax.Array:
    """The sum of the loss over the scored tokens, in nats; everything but the head computes in the compute dtype."""
    params = optim.join(cast_to_compute_dtype(cfg, trained), cast_to_compute_dtype(cfg, frozen))
    images = cast_to_compute_dtype(cfg, batch.images)
    hidden, _ = VLM(cfg.model).apply(
        {"params": params}, batch.replace(images=images), method="hidden"
    )
    head = output_head(cfg)
    of_head = [
        {path: x for path, x in part.items() if path in head.letters} for part in (trained, frozen)
    ]
    return head_cross_entropy(head, *of_head, hidden, batch, cfg.train.loss_chunk)


def output_head(cfg: Experiment) -> Head:
    name = "embedding" if cfg.decoder.tie_word_embeddings else "free_head"
    boxes = traverse_util.flatten_dict(abstract_params(cfg))

    def apply(params, x):
        return VLM(cfg.model).apply(
            {"params": traverse_util.unflatten_dict(params)}, x, method="head"
        )

    letters = {path: box.letters for path, box in boxes.items() if path[:2] == ("decoder", name)}
    return Head(apply, letters, cfg.decoder.vocab_size)


def accumulate_gradients(gradient: Callable, batch: Batch, parts: int):
    """The sum of `gradient`, a tree of float32 arrays, over `parts` microbatches.

    Each takes every `parts`-th row, so that rows stay on their devices.
    """
    if parts == 1:
        return gradient(batch)
    interleaved = jax.tree.map(
        lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, gradient(jax.tree.map(axes.constrain_rows, part))), None

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], interleaved))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, interleaved)[0]


def train_step(cfg: Experiment, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """Returns the next state, and `loss` (nats per scored token), `grad_norm` and `learning_rate` of this step.

    And by the path of a parameter `finite`, whether its gradient is (the sums are those of `grad_norm`), and `largest`,
    its `max_abs_params` before the step. The loss is divided by the scored tokens of the whole batch, so that microbatches
    with few and with many of them count as they should.
    """
    trained, frozen = optim.split(state.params, cfg.optim)
    count = jnp.maximum(jnp.sum(batch.loss_weights), 1)

    def gradient(part):
        return jax.value_and_grad(lambda trained: batch_loss(cfg, trained, frozen, part) / count)(
            trained
        )

    value, gradients = accumulate_gradients(gradient, batch, cfg.train.microbatches)
    transform = optim.optimizer(cfg.optim, cfg.train.steps)
    updates, optimizer = transform.update(gradients, state.optimizer, trained)
    params = optim.join(optax.apply_updates(trained, updates), frozen)
    norm = optax.tree.norm(gradients)
    metrics = {
        "loss": value,
        "grad_norm": norm,
        "learning_rate": optim.schedule(cfg.optim, cfg.train.steps)(state.step),
        "finite": {
            "/".join(path): jnp.isfinite(jnp.sum(jnp.square(x))) for path, x in gradients.items()
        },
        "largest": max_abs_params(trained | frozen, ~jnp.isfinite(value + norm)),
    }
    return State(state.step + 1, params, optimizer), metrics


def max_abs_params(params: Params, wanted: jax.Array) -> dict[str, jax.Array]:
    """The largest absolute number of every parameter, by its path; 0, and nothing is read, unless they are `wanted`."""

    def largest():
        return {
            "/".join(path): jnp.max(jnp.abs(x)).astype(jnp.float32) for path, x in params.items()
        }

    return jax.lax.cond(
        wanted, largest, lambda: {"/".join(path): jnp.float32(0) for path in params}
    )


def jit_train_step(
    cfg: Experiment, mesh: jax.sharding.Mesh
) -> Callable[[State, Batch], tuple[State, dict]]:
    """`train_step` over the mesh; the state is donated."""
    state = state_shardings(cfg, mesh)
    return jax.jit(
        lambda state, batch: train_step(cfg, state, batch),
        in_shardings=(state, axes.row_sharding(mesh)),
        out_shardings=(state, axes.replicated(mesh)),
        donate_argnums=0,
    )


def compile_train_step(
    cfg: Experiment, mesh: jax.sharding.Mesh, state: State, batch: Batch
) -> jax.stages.Compiled:
    """`jit_train_step` of arrays like these; what the compiler held is free before the first step takes its memory."""
    program = jit_train_step(cfg, mesh).lower(state, batch).compile()
    trim_memory()
    return program
