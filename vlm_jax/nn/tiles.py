"""Images in tiles, each with an embedding of its place: the encoder of Llama 3.2 Vision.

    image -> J tiles -> patches, class token -> positions of tile and patch -> blocks -> gated blocks -> J * (1 + P)

The reference is transformers, models/mllama/modeling_mllama.py, `MllamaVisionModel`.
"""

from dataclasses import replace

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.config import Vision
from vlm_jax.nn.blocks import Stack
from vlm_jax.nn.layers import Embed, Norm, embedding_init
from vlm_jax.nn.patches import PatchEmbed
from vlm_jax.structs import Context

MULTIPLE = 8  # the tokens of a tile are filled up to a multiple; what fills them is seen by all the others


class TiledBody(nn.Module):
    """(B, J, height, width, channels), the layout of the tiles and which are there -> (B, J * (1 + P), E).

    E is the output's width and behind it that of every hidden state in `feature_layers`.
    """

    cfg: Vision

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B J height width channels"],
        layouts: Int[Array, "B"],
        tile_mask: Bool[Array, "B J"],
    ) -> Float[Array, "B T E"]:
        cfg, (rows, tiles) = self.cfg, images.shape[:2]
        x = PatchEmbed(replace(cfg, positions="none"), name="patch_embed")(images.reshape(-1, *images.shape[2:]))
        x = x.reshape(rows, tiles, -1, cfg.width)
        x = x + self._tile_embedding("pre_tile", layouts, tiles)
        token = self.param("class_token", axes.lettered(embedding_init, "D"), (cfg.width,))
        x = jnp.concatenate([jnp.broadcast_to(token, (rows, tiles, 1, cfg.width)), x], axis=2)
        x = x + self._positions(layouts, x.shape[1:])
        x = self._norm("pre_norm", x)
        length = x.shape[2]
        filled = -(-length // MULTIPLE) * MULTIPLE
        x = jnp.pad(x, ((0, 0), (0, 0), (0, filled - length), (0, 0)))
        there = jnp.broadcast_to(tile_mask[..., None] & (jnp.arange(filled) < length), (rows, tiles, filled))
        there = there.reshape(rows, 1, -1)
        context = Context(mask=(there[..., None] | there[:, :, None]))  # only filling does not see filling
        self.sow("intermediates", "embeddings", x)
        stack = Stack(cfg, (("self", "mlp"),) * cfg.depth, wanted=cfg.feature_layers, name="blocks")
        x, kept, _ = stack(x.reshape(rows, -1, cfg.width), context)
        x = self._norm("final_norm", x).reshape(rows, tiles, filled, -1)
        x = (x + self._tile_embedding("post_tile", layouts, tiles)).reshape(rows, -1, cfg.width)
        gated = replace(cfg, depth=cfg.global_depth, residual_scale="tanh", unroll=1)
        x, _, _ = Stack(gated, (("self", "mlp"),) * cfg.global_depth, name="global_blocks")(x, context)
        x = jnp.concatenate([x, *kept], axis=-1).reshape(rows, tiles, filled, -1)[:, :, :length]
        return x.reshape(rows, tiles * length, -1)

    def _norm(self, name, x):
        return Norm(self.cfg.norm, self.cfg.norm_eps, name=name)(x)

    def _gate(self, name):
        return jnp.tanh(self.param(f"{name}_gate", axes.lettered(nn.initializers.zeros, "1"), (1,)))

    def _tile_embedding(self, name, layouts, tiles):
        """(B, J, 1, D): one vector a tile, by its place in the layout; behind a gate that starts at 0."""
        width = self.cfg.width
        table = Embed(self.cfg.tile_layouts, tiles * width, letters="J D", name=name)(layouts)
        return self._gate(name) * table.reshape(len(layouts), tiles, 1, width)

    def _positions(self, layouts, shape):
        """(B, J, 1 + P, D): positions shared by all tiles, and as the gate opens those of each tile in their place."""
        tiles, length, width = shape
        shared = self.param("positions", axes.lettered(embedding_init, "P D"), (length, width))
        own = Embed(self.cfg.tile_layouts, tiles * length * width, letters="J D", name="tile_positions")(layouts)
        gate = self._gate("positions")
        return (1 - gate) * shared + gate * own.reshape(len(layouts), *shape)
