"""Masked cross-entropy as a pair (sum, count), divided once after every reduction."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.structs import Batch


def cross_entropy(logits: Float[Array, "B S V"], batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of -log p(target) in nats over the scored tokens, and their number; computed in float32."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.sum(nats * batch.loss_weights), jnp.sum(batch.loss_weights)
