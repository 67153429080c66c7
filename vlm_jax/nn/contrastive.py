"""Two-tower image-text models, trained to match images with texts (CLIP, SigLIP)."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.config import Contrastive as ContrastiveConfig
from vlm_jax.nn.blocks import NOT_FUSED
from vlm_jax.nn.decoder import Decoder
from vlm_jax.nn.fusion import text_mask
from vlm_jax.nn.layers import Dense
from vlm_jax.nn.vit import ViT
from vlm_jax.structs import ContrastiveOutput, DecoderInputs

INITIAL_SCALE = math.log(1 / 0.07)  # Radford et al. 2021 (CLIP), section 2.5
INITIAL_BIAS = -10.0  # Zhai et al. 2023 (SigLIP), section 3.2


class Contrastive(nn.Module):
    """B images and R texts -> unit-length embeddings of width W, and logits of all B x R pairs.

    Images may have any size. `attention_mask` is False for padding tokens. Images may also be
    patches (B, P, C) of unequal numbers, padded: `patch_images` is 1 for a patch and 0 for padding,
    `patch_places` has row and column of each (SigLIP 2 NaFlex).
    """

    cfg: ContrastiveConfig

    def setup(self):
        cfg = self.cfg
        self.vision = ViT(cfg.vision)
        self.text = Decoder(cfg.text, NOT_FUSED)
        if cfg.image_projection:
            shape = (cfg.vision.width, cfg.embed_width)
            self.image_projection = Dense("D W", shape, bias=False)
        shape = (cfg.text.width, cfg.embed_width)
        self.text_projection = Dense("D W", shape, bias=cfg.text_projection_bias)
        self.logit_scale = self._scalar("logit_scale", INITIAL_SCALE)
        if cfg.logit_bias:
            self.logit_bias = self._scalar("logit_bias", INITIAL_BIAS)

    def _scalar(self, name, value):
        return self.param(name, axes.with_axes(nn.initializers.constant(value), "1"), (1,))

    def __call__(
        self,
        images: Float[Array, "B *dims"],
        tokens: Int[Array, "R S"],
        attention_mask: Bool[Array, "R S"] | None = None,
        patch_images: Int[Array, "B P"] | None = None,
        patch_places: Int[Array, "B P 2"] | None = None,
    ) -> ContrastiveOutput:
        image_embeds = self.image_embeds(images, patch_images, patch_places)
        text_embeds = self.text_embeds(tokens, attention_mask)
        logits = image_embeds @ text_embeds.T * jnp.exp(self.logit_scale)
        if self.cfg.logit_bias:
            logits = logits + self.logit_bias
        return ContrastiveOutput(image_embeds, text_embeds, logits)

    def image_embeds(
        self,
        images: Float[Array, "B *dims"],
        patch_images: Int[Array, "B P"] | None = None,
        patch_places: Int[Array, "B P 2"] | None = None,
    ) -> Float[Array, "B W"]:
        """Image features, normalized to length 1."""
        return _normalize(self.image_features(images, patch_images, patch_places))

    def text_embeds(
        self, tokens: Int[Array, "R S"], attention_mask: Bool[Array, "R S"] | None = None
    ) -> Float[Array, "R W"]:
        """Text features, normalized to length 1."""
        return _normalize(self.text_features(tokens, attention_mask))

    def image_features(
        self,
        images: Float[Array, "B *dims"],
        patch_images: Int[Array, "B P"] | None = None,
        patch_places: Int[Array, "B P 2"] | None = None,
    ) -> Float[Array, "B W"]:
        """Projected pooled output of the image tower, not normalized."""
        pooled = self.vision.encode(
            images, patch_images=patch_images, patch_places=patch_places
        ).pooled
        return self.image_projection(pooled) if self.cfg.image_projection else pooled

    def text_features(
        self, tokens: Int[Array, "R S"], attention_mask: Bool[Array, "R S"] | None = None
    ) -> Float[Array, "R W"]:
        """Projected hidden state of each text's pooled token, not normalized."""
        if attention_mask is None:
            attention_mask = jnp.ones(tokens.shape, bool)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.text.embed(tokens)
        mask = text_mask(attention_mask, self.cfg.causal)
        hidden, _ = self.text(DecoderInputs(x, positions, mask))
        pooled = hidden[jnp.arange(len(tokens)), self._pooled_positions(tokens)]  # (R, D)
        return self.text_projection(pooled)

    def _pooled_positions(self, tokens):
        """(R, S) -> (R,): position of the token whose hidden state represents the text."""
        pool = self.cfg.text_pool
        if pool == "last":
            # The last slot of the row, even if it is padding (SigLIP).
            return jnp.full(len(tokens), tokens.shape[1] - 1)
        if pool == "largest_id":
            return jnp.argmax(tokens, axis=-1)
        return jnp.argmax(tokens == self.cfg.eos_id, axis=-1)


def _normalize(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
