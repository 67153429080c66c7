"""Two towers, one for images and one for texts, whose outputs are compared by a dot product (CLIP, SigLIP)."""

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
    """B images and R texts -> a vector each, of length 1, and how well every image fits every text.

    Images are (B, height, width, channels) of any size, texts (R, S) ids; `there` is false where a slot is padding.
    """

    cfg: ContrastiveConfig

    def setup(self):
        cfg = self.cfg
        self.vision = ViT(cfg.vision)
        self.text = Decoder(cfg.text, NOT_FUSED)
        if cfg.image_projection:
            self.image_projection = Dense("D W", (cfg.vision.width, cfg.embed_width), bias=False)
        self.text_projection = Dense(
            "D W", (cfg.text.width, cfg.embed_width), bias=cfg.text_projection_bias
        )
        self.logit_scale = self._number("logit_scale", INITIAL_SCALE)
        if cfg.logit_bias:
            self.logit_bias = self._number("logit_bias", INITIAL_BIAS)

    def _number(self, name, value):
        return self.param(name, axes.with_axes(nn.initializers.constant(value), "1"), (1,))

    def __call__(
        self,
        images: Float[Array, "B height width channels"],
        tokens: Int[Array, "R S"],
        there: Bool[Array, "R S"] | None = None,
    ) -> ContrastiveOutput:
        image, text = self.image_embeds(images), self.text_embeds(tokens, there)
        logits = image @ text.T * jnp.exp(self.logit_scale)
        return ContrastiveOutput(
            image, text, logits + self.logit_bias if self.cfg.logit_bias else logits
        )

    def image_embeds(self, images: Float[Array, "B height width channels"]) -> Float[Array, "B W"]:
        return _unit(self.image_features(images))

    def text_embeds(
        self, tokens: Int[Array, "R S"], there: Bool[Array, "R S"] | None = None
    ) -> Float[Array, "R W"]:
        return _unit(self.text_features(tokens, there))

    def image_features(
        self, images: Float[Array, "B height width channels"]
    ) -> Float[Array, "B W"]:
        """The vectors before they get the length 1."""
        pooled = self.vision.encode(images).pooled
        return self.image_projection(pooled) if self.cfg.image_projection else pooled

    def text_features(
        self, tokens: Int[Array, "R S"], there: Bool[Array, "R S"] | None = None
    ) -> Float[Array, "R W"]:
        there = jnp.ones(tokens.shape, bool) if there is None else there
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        stream = DecoderInputs(
            self.text.embed(tokens), positions, text_mask(there, self.cfg.causal)
        )
        hidden, _ = self.text(stream)
        return self.text_projection(hidden[jnp.arange(len(tokens)), self._pooled_slots(tokens)])

    def _pooled_slots(self, tokens):
        """(R,) slots of the tokens that stand for the texts; "last" is the last slot even where it is padding."""
        if self.cfg.text_pool == "last":
            return jnp.full(len(tokens), tokens.shape[1] - 1)
        return jnp.argmax(
            tokens if self.cfg.text_pool == "largest_id" else tokens == self.cfg.eos_id, axis=-1
        )


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
