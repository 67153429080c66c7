"""Large images in tiles, each with an embedding of its place: the encoder of Llama 3.2 Vision.

    image -> J tiles -> patches, class token -> positions of tile and patch -> blocks -> gated blocks -> J * (1 + P)

The reference is transformers, models/mllama/modeling_mllama.py, `MllamaVisionModel`.
"""

import math
from dataclasses import replace

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.config import Vision
from vlm_jax.nn.blocks import Stack
from vlm_jax.nn.layers import Embed, Norm, embedding_init
from vlm_jax.nn.patches import PatchEmbed
from vlm_jax.structs import BlockInputs

TOKEN_MULTIPLE = (
    8  # zeros fill the tokens of a tile up to a multiple, and trained weights expect them
)


class TiledViT(nn.Module):
    """(B, J, height, width, channels), the layouts of the tiles and which are there -> (B, J * (1 + P), E).

    E is the output's width, and behind it come the hidden states of `feature_layers`, woven: the first number of each,
    the second of each, and so on.
    """

    cfg: Vision

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B J height width channels"],
        layouts: Int[Array, "B"],
        tile_mask: Bool[Array, "B J"],
    ) -> Float[Array, "B T E"]:
        cfg = self.cfg
        x = self._embed(images, layouts)
        rows, tiles, length, width = x.shape
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % TOKEN_MULTIPLE), (0, 0)))
        tiled = x.shape
        self.sow("intermediates", "embeddings", x)
        context = BlockInputs(mask=padding_mask(tile_mask, length, x.shape[2]))
        stack = Stack(
            cfg, (("self", "mlp"),) * cfg.depth, return_layers=cfg.feature_layers, name="blocks"
        )
        x, kept, _ = stack(x.reshape(rows, -1, width), context)
        x = self._norm("final_norm", x).reshape(tiled) + self._tile_embedding(
            "post_tile", layouts, tiles
        )
        gated = replace(cfg, layer_scale="tanh_gate")
        stack = Stack(gated, (("self", "mlp"),) * cfg.num_global_layers, name="global_blocks")
        x, _, _ = stack(x.reshape(rows, -1, width), context)
        woven = [jnp.stack(kept, axis=-1).reshape(*x.shape[:2], -1)] if kept else []
        x = jnp.concatenate([x, *woven], axis=-1).reshape(*tiled[:3], -1)
        return x[:, :, :length].reshape(rows, tiles * length, -1)

    def _embed(self, images, layouts):
        """(B, J, 1 + P, D): patches with the class token in front, and where they are."""
        cfg, (rows, tiles) = self.cfg, images.shape[:2]
        x = PatchEmbed(replace(cfg, positions="none"), name="patch_embed")(
            images.reshape(-1, *images.shape[2:])
        )
        x = x.reshape(rows, tiles, -1, cfg.width) + self._tile_embedding("pre_tile", layouts, tiles)
        token = self.param("class_token", axes.with_axes(embedding_init, "D"), (cfg.width,))
        x = jnp.concatenate([jnp.broadcast_to(token, (rows, tiles, 1, cfg.width)), x], axis=2)
        return self._norm("pre_norm", x + self._positions(layouts, x.shape[1:]))

    def _norm(self, name, x):
        return Norm(self.cfg.norm, self.cfg.norm_eps, name=name)(x)

    def _gate(self, name):
        return jnp.tanh(
            self.param(f"{name}_gate", axes.with_axes(nn.initializers.zeros, "1"), (1,))
        )

    def _by_layout(self, name, layouts, shape):
        """(B, *shape): what is learned for each layout; row 0 is for no image."""
        num, width = 1 + len(self.cfg.tile_layouts), math.prod(shape)
        return Embed(num, width, letters="J D", name=name)(layouts[:, None]).reshape(-1, *shape)

    def _tile_embedding(self, name, layouts, tiles):
        """(B, J, 1, D): one vector a tile, behind a gate that starts at 0."""
        return self._gate(name) * self._by_layout(name, layouts, (tiles, 1, self.cfg.width))

    def _positions(self, layouts, shape):
        """(B, J, 1 + P, D): positions that all tiles share, and as the gate opens those of each tile in their place."""
        shared = self.param("positions", axes.with_axes(embedding_init, "P D"), shape[1:])
        gate = self._gate("positions")
        return (1 - gate) * shared + gate * self._by_layout("tile_positions", layouts, shape)


def padding_mask(tile_mask: Bool[Array, "B J"], length: int, filled: int) -> Bool[Array, "B 1 T T"]:
    """Which of the J * filled tokens see each other: all, but what fills a tile or an absent tile does not see filling.

    Tokens of an image do see it: that is how the weights were trained.
    """
    there = tile_mask[:, :, None] & (jnp.arange(filled) < length)
    there = there.reshape(len(there), 1, -1)
    return there[..., :, None] | there[..., None, :]
