"""The image encoder: a Vision Transformer (Dosovitskiy et al. 2021), or nothing but patches (Fuyu)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.config import Transformer, Vision
from vlm_jax.nn.attention import Attention
from vlm_jax.nn.blocks import Stack
from vlm_jax.nn.layers import (
    Dense,
    Mlp,
    Norm,
    embedding_init,
)
from vlm_jax.nn.patches import PatchEmbed
from vlm_jax.nn.tiles import TiledViT
from vlm_jax.structs import BlockInputs, EncoderOutput


class ViT(nn.Module):
    """Images -> what the projector reads: (B, P, E), or (B, 1 + P, E) where the class token is kept.

    Images are (B, height, width, channels) of any size: positions are resampled to its grid of patches. With `kind`
    "none" the tokens are the flattened patches themselves. With `tile_layouts`, images are
    (B, J, height, width, channels) and the tokens (B, J * (1 + P), E).
    """

    cfg: Vision

    def __call__(
        self,
        images: Float[Array, "B *dims"],
        layouts: Int[Array, "B"] | None = None,
        tile_mask: Bool[Array, "B J"] | None = None,
    ) -> Float[Array, "B P E"]:
        return self.encode(images, layouts, tile_mask).features

    @nn.compact
    def encode(self, images, layouts=None, tile_mask=None) -> EncoderOutput:
        """All outputs: tokens with the class token in front, the pooled vector, and the projector's features."""
        cfg = self.cfg
        if cfg.tile_layouts:
            tokens = TiledViT(cfg, name="tiled")(images, layouts, tile_mask)
            return EncoderOutput(tokens, features=tokens)
        x = PatchEmbed(cfg, name="patch_embed")(images)
        if cfg.kind == "none":
            return EncoderOutput(x, features=x)
        x = self._with_class_token(x)
        if cfg.pre_norm:
            x = self._norm("pre_norm", x)
        self.sow("intermediates", "embeddings", x)
        x = axes.constrain(x, "B P D")
        stack = Stack(
            cfg, (("self", "mlp"),) * cfg.depth, return_layers=cfg.feature_layers, name="blocks"
        )
        x, kept, _ = stack(x, BlockInputs())
        if cfg.final_norm == "tokens":
            x = self._norm("final_norm", x)
        features = jnp.concatenate(kept, axis=-1) if kept else x
        if cfg.class_token and not cfg.keep_class_token:
            features = features[:, 1:]
        return EncoderOutput(x, self._pool(x), features, self._classify(x))

    def _norm(self, name, x):
        return Norm(self.cfg.norm, self.cfg.norm_eps, name=name)(x)

    def _with_class_token(self, x):
        cfg = self.cfg
        if cfg.mask_token:
            self.param("mask_token", axes.with_axes(nn.initializers.zeros, "D"), (cfg.width,))
        if not cfg.class_token:
            return x
        token = self.param("class_token", axes.with_axes(embedding_init, "D"), (cfg.width,))
        position = self.param("class_position", axes.with_axes(embedding_init, "D"), (cfg.width,))
        return jnp.concatenate(
            [jnp.broadcast_to(token + position, (len(x), 1, cfg.width)), x], axis=1
        )

    def _pool(self, x):
        """(B, P, D) -> (B, D)."""
        cfg = self.cfg
        if cfg.pool == "attention":
            return AttentionPool(cfg, name="pool")(x)
        pooled = x[:, 0]
        if cfg.final_norm == "pooled":
            pooled = self._norm("final_norm", pooled)
        if cfg.pool == "tanh":
            return jnp.tanh(Dense("D D", (cfg.width, cfg.width), name="pool")(pooled))
        return pooled if cfg.pool == "class" else None

    def _classify(self, x):
        """(B, P, D) -> (B, V)."""
        cfg = self.cfg
        return (
            Dense("D V", (cfg.width, cfg.classes), name="classifier")(x[:, 0])
            if cfg.classes
            else None
        )


class AttentionPool(nn.Module):
    """A learned query reads all tokens: (B, P, D) -> (B, D) (MAP head; Zhai et al. 2022, section 3.2)."""

    cfg: Transformer

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        query = self.param("query", axes.with_axes(embedding_init, "D"), (self.cfg.width,))
        y, _ = Attention(self.cfg, name="attention")(
            jnp.broadcast_to(query, (len(x), 1, *query.shape)), x
        )
        return (
            y + Mlp(self.cfg, name="mlp")(Norm(self.cfg.norm, self.cfg.norm_eps, name="norm")(y))
        )[:, 0]
