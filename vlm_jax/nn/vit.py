"""The image encoder: a Vision Transformer (Dosovitskiy et al. 2021), or patches alone (Fuyu)."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.config import Transformer, Vision
from vlm_jax.nn.attention import Attention
from vlm_jax.nn.blocks import Stack
from vlm_jax.nn.layers import Dense, Mlp, Norm, embedding_init
from vlm_jax.nn.patches import PatchEmbed, image_grids
from vlm_jax.nn.positions import patch_coordinates, patch_rope_tables
from vlm_jax.nn.tiled_vit import TiledViT
from vlm_jax.structs import PADDING, BlockInputs, EncoderOutput, SegmentPattern


class ViT(nn.Module):
    """Images -> the projector's input, (B, P, E), or (B, 1 + P, E) with `keep_class_token`.

    The blocks also see `registers`, which do not leave.

    | cfg                      | images                           | output                |
    |--------------------------|----------------------------------|-----------------------|
    | kind "vit"               | (B, height, width, channels)     | hidden states         |
    | kind "none"              | (B, height, width, channels)     | flattened patches     |
    | `tile_layouts` (mllama)  | (B, J, height, width, channels)  | (B, J * (1 + P), E)   |
    | `max_patches` (native)   | (B, P, C): patches of any images | (B, P, E)             |

    Images may have any size: learned positions are resampled to the grid of patches. At native
    resolution a row holds the patches of several images, which attend to their own image alone
    (NaViT; Dehghani et al. 2023, section 2.1).
    """

    cfg: Vision

    def __call__(
        self,
        images: Float[Array, "B *dims"],
        layouts: Int[Array, "B"] | None = None,
        tile_mask: Bool[Array, "B J"] | None = None,
        patch_images: Int[Array, "B P"] | None = None,
        patch_places: Int[Array, "B P 2"] | None = None,
    ) -> Float[Array, "B P E"]:
        return self.encode(images, layouts, tile_mask, patch_images, patch_places).features

    @nn.compact
    def encode(
        self, images, layouts=None, tile_mask=None, patch_images=None, patch_places=None
    ) -> EncoderOutput:
        """Returns all outputs: tokens, pooled vector, projector features and class logits.

        `patch_images` and `patch_places` are of `Batch`, at native resolution.
        """
        cfg = self.cfg
        if cfg.tile_layouts:
            tokens = TiledViT(cfg, name="tiled")(images, layouts, tile_mask)
            return EncoderOutput(tokens, features=tokens)
        is_packed = patch_images is not None
        grids = image_grids(patch_images, patch_places) if is_packed else None
        x = PatchEmbed(cfg, name="patch_embed")(images, patch_places, grids)
        if not cfg.has_encoder:
            return EncoderOutput(x, features=x)

        x = self._add_prefix_tokens(x)
        if cfg.pre_norm:
            x = self._norm("pre_norm", x)
        self.sow("intermediates", "embeddings", x)
        x = axes.constrain(x, "B P D")
        sublayers = (("self", "mlp"),) * cfg.depth
        stack = Stack(
            cfg,
            sublayers,
            sliding=cfg.windowed_layers,
            return_layers=cfg.feature_layers + cfg.deepstack_layers,
            name="blocks",
        )
        if is_packed:
            block_inputs = self._packed_inputs(patch_images, patch_places, grids)
        else:
            block_inputs = self._block_inputs(images)
        x, hidden_states, _ = stack(x, block_inputs)
        if cfg.final_norm == "tokens":
            x = self._norm("final_norm", x)

        # Features of intermediate layers come without the final norm (LLaVA).
        count = len(cfg.feature_layers)
        features = jnp.concatenate(hidden_states[:count], axis=-1) if count else x
        if cfg.deepstack_layers:
            features = jnp.concatenate([features, *hidden_states[count:]], axis=-1)
        if cfg.prefix_tokens > cfg.extra_tokens:
            kept = features[:, : cfg.extra_tokens]
            features = jnp.concatenate([kept, features[:, cfg.prefix_tokens :]], axis=1)
        mask = (patch_images != PADDING)[:, None, None] if is_packed else None
        return EncoderOutput(x, self._pool(x, mask), features, self._classify(x))

    def _norm(self, name, x):
        return Norm(self.cfg.norm, self.cfg.norm_eps, name=name)(x)

    def _block_inputs(self, images) -> BlockInputs:
        """Rotations of the patches of (B, height, width, channels); other tokens have none."""
        cfg = self.cfg
        if cfg.rope.kind == "none":
            return BlockInputs()
        grid = images.shape[1] // cfg.patch_size_px, images.shape[2] // cfg.patch_size_px
        places = np.indices(grid).reshape(2, -1).T  # (P, 2)
        coordinates = patch_coordinates(places, np.array(grid), cfg.rope)
        coordinates = np.pad(coordinates, ((cfg.prefix_tokens, 0), (0, 0)))
        return BlockInputs(rope=patch_rope_tables(jnp.asarray(coordinates[None]), cfg))

    def _packed_inputs(self, patch_images, patch_places, grids) -> BlockInputs:
        """As `_block_inputs`, for packed patches, and masks that keep images and windows apart.

        Padding attends to padding, and nothing to it.
        """
        cfg = self.cfg
        windows, local_mask = None, None
        if cfg.windowed_layers:
            # Numbered within an image, which has fewer windows than the row has patches.
            row, column = jnp.moveaxis(patch_places // cfg.window_patches, -1, 0)
            windows = row * -(-grids[..., 1] // cfg.window_patches) + column
            windows += patch_images * patch_images.shape[1]
            local_mask = _same(windows)
        pattern = SegmentPattern(patch_images, causal=False, local_segments=windows)
        rope = None
        if cfg.rope.kind != "none":
            rope = patch_rope_tables(patch_coordinates(patch_places, grids, cfg.rope), cfg)
        return BlockInputs(
            mask=_same(patch_images), local_mask=local_mask, pattern=pattern, rope=rope
        )

    def _add_prefix_tokens(self, x):
        """(B, P, D) -> (B, 1 + Q + P, D): class token, if any, then registers, then patches."""
        cfg = self.cfg
        init = axes.with_axes(embedding_init, "D")
        tokens = []
        if cfg.mask_token:
            # Never used, but part of DINO's checkpoints: kept so that they export completely.
            self.param("mask_token", axes.with_axes(nn.initializers.zeros, "D"), (cfg.width,))
        if cfg.class_token:
            token = self.param("class_token", init, (cfg.width,))
            if cfg.positions != "none":
                token = token + self.param("class_position", init, (cfg.width,))
            tokens.append(token[None])
        if cfg.registers:
            registers_init = axes.with_axes(embedding_init, "Q D")
            tokens.append(self.param("registers", registers_init, (cfg.registers, cfg.width)))
        if not tokens:
            return x
        tokens = jnp.concatenate(tokens)
        tokens = jnp.broadcast_to(tokens, (len(x), *tokens.shape))
        return jnp.concatenate([tokens, x], axis=1)

    def _pool(self, x, mask):
        """(B, P, D) -> (B, D), or None."""
        cfg = self.cfg
        if cfg.pool == "attention":
            return AttentionPool(cfg, name="pool")(x, mask)
        pooled = x[:, 0]  # the class token
        if cfg.final_norm == "pooled":
            pooled = self._norm("final_norm", pooled)
        if cfg.pool == "tanh":
            return jnp.tanh(Dense("D D", (cfg.width, cfg.width), name="pool")(pooled))
        return pooled if cfg.pool == "class" else None

    def _classify(self, x):
        """(B, P, D) -> class logits (B, V), or None."""
        cfg = self.cfg
        if cfg.classes is None:
            return None
        return Dense("D V", (cfg.width, cfg.classes), name="classifier")(x[:, 0])


def _same(ids: Int[Array, "B P"]) -> Bool[Array, "B 1 P P"]:
    """Returns the mask of patches with equal ids."""
    return (ids[:, :, None] == ids[:, None])[:, None]


class AttentionPool(nn.Module):
    """Attention pooling with one learned query: (B, P, D) -> (B, D).

    The MAP head of Zhai et al. 2022 (Scaling Vision Transformers), section 3.2.
    """

    cfg: Transformer

    @nn.compact
    def __call__(
        self, x: Float[Array, "B P D"], mask: Bool[Array, "B 1 1 P"] | None = None
    ) -> Float[Array, "B D"]:
        cfg = self.cfg
        query = self.param("query", axes.with_axes(embedding_init, "D"), (cfg.width,))
        query = jnp.broadcast_to(query, (len(x), 1, cfg.width))
        y, _ = Attention(cfg, name="attention")(query, x, mask)
        normed = Norm(cfg.norm, cfg.norm_eps, name="norm")(y)
        y = y + Mlp(cfg, name="mlp")(normed)
        return y[:, 0]
