"""ViT for images in tiles, with embeddings of the tile layout: the encoder of Llama 3.2 Vision.

    J tiles -> patches + tile embedding, class token -> position embeddings -> blocks
            -> tile embedding -> gated blocks -> J * (1 + P) tokens

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

# The tokens of a tile are padded to a multiple of 8. Padding is attended to (see `padding_mask`),
# so the published weights depend on it.
TOKEN_MULTIPLE = 8


class TiledViT(nn.Module):
    """Encodes all tiles of an image as one sequence.

    Args:
      images: the J tiles of every image; absent tiles may hold anything.
      layouts: index of the layout of the tiles in `cfg.tile_layouts`, from 1; 0: no image.
      tile_mask: True where a tile is present.

    Returns:
      T = J * (1 + P) tokens of width E = D * (1 + number of `feature_layers`): the output, then
      the hidden states of `feature_layers` interleaved, that is dimension 0 of each layer,
      dimension 1 of each layer, and so on.
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
        padded_length = x.shape[2]
        self.sow("intermediates", "embeddings", x)

        # The blocks see the tiles of an image as one sequence.
        block_inputs = BlockInputs(mask=padding_mask(tile_mask, length, padded_length))
        sublayers = (("self", "mlp"),) * cfg.depth
        stack = Stack(cfg, sublayers, return_layers=cfg.feature_layers, name="blocks")
        x, hidden_states, _ = stack(x.reshape(rows, -1, width), block_inputs)
        x = self._norm("final_norm", x).reshape(rows, tiles, padded_length, width)
        x = x + self._tile_embedding("post_tile", layouts, tiles)

        gated_cfg = replace(cfg, layer_scale="tanh_gate")
        sublayers = (("self", "mlp"),) * cfg.num_global_layers
        stack = Stack(gated_cfg, sublayers, name="global_blocks")
        x, _, _ = stack(x.reshape(rows, -1, width), block_inputs)

        if hidden_states:
            interleaved = jnp.stack(hidden_states, axis=-1).reshape(*x.shape[:2], -1)
            x = jnp.concatenate([x, interleaved], axis=-1)
        x = x.reshape(rows, tiles, padded_length, -1)[:, :, :length]
        return x.reshape(rows, tiles * length, -1)

    def _embed(self, images, layouts):
        """(B, J, 1 + P, D): class token and patches, with their position embeddings."""
        cfg = self.cfg
        rows, tiles = images.shape[:2]
        patch_embed = PatchEmbed(replace(cfg, positions="none"), name="patch_embed")
        x = patch_embed(images.reshape(-1, *images.shape[2:]))
        x = x.reshape(rows, tiles, -1, cfg.width) + self._tile_embedding("pre_tile", layouts, tiles)
        class_token = self.param("class_token", axes.with_axes(embedding_init, "D"), (cfg.width,))
        class_token = jnp.broadcast_to(class_token, (rows, tiles, 1, cfg.width))
        x = jnp.concatenate([class_token, x], axis=2)
        return self._norm("pre_norm", x + self._position_embedding(layouts, x.shape[1:]))

    def _norm(self, name, x):
        return Norm(self.cfg.norm, self.cfg.norm_eps, name=name)(x)

    def _gate(self, name):
        zeros = axes.with_axes(nn.initializers.zeros, "1")
        return jnp.tanh(self.param(f"{name}_gate", zeros, (1,)))

    def _layout_embedding(self, name, layouts, shape):
        """(B, *shape): a learned embedding of each layout; row 0 is for "no image"."""
        rows = 1 + len(self.cfg.tile_layouts)
        embed = Embed(rows, math.prod(shape), letters="J D", name=name)
        return embed(layouts[:, None]).reshape(-1, *shape)

    def _tile_embedding(self, name, layouts, tiles):
        """(B, J, 1, D): an embedding of each tile, behind a gate that starts at 0."""
        shape = (tiles, 1, self.cfg.width)
        return self._gate(name) * self._layout_embedding(name, layouts, shape)

    def _position_embedding(self, layouts, shape):
        """(B, J, 1 + P, D): (1 - gate) * shared positions + gate * positions by tile and layout.

        The gate starts at 0.
        """
        shared = self.param("positions", axes.with_axes(embedding_init, "P D"), shape[1:])
        gate = self._gate("positions")
        shared = (1 - gate) * shared
        return shared + gate * self._layout_embedding("tile_positions", layouts, shape)


def padding_mask(tile_mask: Bool[Array, "B J"], length: int, filled: int) -> Bool[Array, "B 1 T T"]:
    """Attention mask of the padded tile sequence, T = J * filled.

    Padding (absent tiles included) does not attend to padding; everything else attends to
    everything, padding included: that is how the weights were trained.

    Args:
      tile_mask: True where a tile is present.
      length: tokens of a tile.
      filled: tokens of a tile with its padding.
    """
    is_token = tile_mask[:, :, None] & (jnp.arange(filled) < length)
    is_token = is_token.reshape(len(is_token), 1, -1)  # (B, 1, T)
    return is_token[..., :, None] | is_token[..., None, :]
