"""One optimizer step, jitted over the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from flax.linen import meta

from vlm_jax import axes
from vlm_jax.config import Experiment
from vlm_jax.nn.models import boxed_params
from vlm_jax.nn.vlm import VLM, init_params
from vlm_jax.structs import Batch, State
from vlm_jax.train import optim
from vlm_jax.train.loss import cross_entropy


def make_state(cfg: Experiment, key: jax.Array) -> State:
    """A new run's state, all at random; `new_state` jits it so that every parameter is created where it lies."""
    params = meta.unbox(init_params(cfg, key))
    trained, _ = optim.split(params, cfg.optim)
    return State(jnp.int32(0), params, optim.optimizer(cfg.optim, cfg.train.steps).init(trained))


def new_state(cfg: Experiment, mesh: jax.sharding.Mesh, loaded: dict[str, jax.Array]) -> State:
    """A new run's state with the parameters that are `loaded` (by their paths); the others are made, where they lie."""

    def without_loaded(state: State) -> State:
        flat = traverse_util.flatten_dict(state.params, sep="/")
        return state.replace(params={path: x for path, x in flat.items() if path not in loaded})

    shardings = without_loaded(state_shardings(cfg, mesh))
    create = jax.jit(lambda key: without_loaded(make_state(cfg, key)), out_shardings=shardings)
    state = create(jax.random.key(cfg.seed))
    return state.replace(params=traverse_util.unflatten_dict(state.params | loaded, sep="/"))


def state_shapes(cfg: Experiment) -> State:
    """Shapes of what `make_state` makes."""
    params = meta.unbox(boxed_params(cfg))
    trained, _ = optim.split(params, cfg.optim)
    optimizer = jax.eval_shape(optim.optimizer(cfg.optim, cfg.train.steps).init, trained)
    return State(jax.ShapeDtypeStruct((), jnp.int32), params, optimizer)


def state_shardings(cfg: Experiment, mesh: jax.sharding.Mesh) -> State:
    """Where every array of the state lies: what the optimizer keeps of a parameter as the parameter, the rest whole."""
    params = axes.parameter_shardings(boxed_params(cfg), mesh)
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


def train_step(cfg: Experiment, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """Returns the next state, and `loss` (nats per scored token), `grad_norm` and `learning_rate` of this step.

    And `finite`: by its path, whether a parameter's gradient is; the sums are those of `grad_norm`.
    """
    trained, frozen = optim.split(state.params, cfg.optim)

    def loss(trained):
        logits = VLM(cfg).apply({"params": optim.join(trained, frozen)}, batch).logits
        total, count = cross_entropy(logits, batch)
        return total / jnp.maximum(count, 1)

    value, gradients = jax.value_and_grad(loss)(trained)
    transform = optim.optimizer(cfg.optim, cfg.train.steps)
    updates, optimizer = transform.update(gradients, state.optimizer, trained)
    params = optim.join(optax.apply_updates(trained, updates), frozen)
    metrics = {
        "loss": value,
        "grad_norm": optax.tree.norm(gradients),
        "learning_rate": optim.schedule(cfg.optim, cfg.train.steps)(state.step),
        "finite": {"/".join(path): jnp.isfinite(jnp.sum(jnp.square(x))) for path, x in gradients.items()},
    }
    return State(state.step + 1, params, optimizer), metrics


def compiled_step(cfg: Experiment, mesh: jax.sharding.Mesh) -> Callable[[State, Batch], tuple[State, dict]]:
    """`train_step` over the mesh; the state is donated."""
    state = state_shardings(cfg, mesh)
    return jax.jit(
        lambda state, batch: train_step(cfg, state, batch),
        in_shardings=(state, axes.row_sharding(mesh)),
        out_shardings=(state, axes.replicated(mesh)),
        donate_argnums=0,
    )
