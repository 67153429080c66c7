"""The image encoder: a Vision Transformer (Dosovitskiy et al. 2021), or nothing but patches (Fuyu)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.config import Vision
from vlm_jax.nn.blocks import Stack
from vlm_jax.nn.layers import Norm, embedding_init
from vlm_jax.nn.patches import PatchEmbed
from vlm_jax.structs import Context


class ViT(nn.Module):
    """(B, height, width, channels) -> (B, P, E), or (B, 1 + P, E) where the class token is kept.

    With `kind` "none" the tokens are the flattened patches themselves.
    """

    cfg: Vision

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"]) -> Float[Array, "B P E"]:
        cfg = self.cfg
        x = PatchEmbed(cfg, name="patch_embed")(images)
        if cfg.kind == "none":
            return x
        if cfg.class_token:
            token = self.param("class_token", axes.lettered(embedding_init, "D"), (cfg.width,))
            position = self.param("class_position", axes.lettered(embedding_init, "D"), (cfg.width,))
            x = jnp.concatenate([jnp.broadcast_to(token + position, (len(x), 1, cfg.width)), x], axis=1)
        if cfg.pre_norm:
            x = Norm(cfg.norm, cfg.norm_eps, name="pre_norm")(x)
        x = axes.constrain(x, "B P D")
        x, _ = Stack(cfg, (("self", "mlp"),) * cfg.depth, name="blocks")(x, Context())
        if cfg.final_norm:
            x = Norm(cfg.norm, cfg.norm_eps, name="final_norm")(x)
        return x[:, 1:] if cfg.class_token and not cfg.keep_class_token else x
