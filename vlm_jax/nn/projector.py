"""Projectors: map the encoder's tokens to the decoder's width.

A new projector is one class here and one row of `PROJECTORS` in config/model/projector.py, which
names the class and states how many tokens it emits (`config.Projector.num_tokens`). It maps
(B, P, E) to (B, M, D). With learned queries it also takes `patch_images` (B, P) and the number of
images of a row, at native resolution.
"""

from dataclasses import replace
from typing import NamedTuple

import einops
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.config import Fusion, Model, Transformer
from vlm_jax.nn.blocks import Block, BlockFlags
from vlm_jax.nn.layers import (
    ACTIVATIONS,
    Dense,
    Norm,
    embedding_init,
)
from vlm_jax.structs import BlockInputs

Tokens = Float[Array, "B P E"]
Projected = Float[Array, "B M D"]
PatchImages = Int[Array, "B P"] | None  # of `Batch`, at native resolution


class Linear(nn.Module):
    """Linear projection: (B, P, E) -> (B, P, D)."""

    cfg: Model

    @nn.compact
    def __call__(self, x: Tokens) -> Projected:
        bias = self.cfg.projector.bias
        return Dense("E D", (x.shape[-1], self.cfg.decoder.width), bias=bias, name="linear")(x)


class Mlp(nn.Module):
    """Two-layer MLP (LLaVA 1.5): (B, P, E) -> (B, P, D)."""

    cfg: Model

    @nn.compact
    def __call__(self, x: Tokens) -> Projected:
        cfg, width = self.cfg.projector, self.cfg.decoder.width
        hidden = cfg.mlp_width or width
        x = Dense("E D", (x.shape[-1], hidden), bias=cfg.bias, name="linear_1")(x)
        return Dense("E D", (hidden, width), bias=cfg.bias, name="linear_2")(
            ACTIVATIONS[cfg.activation](x)
        )


class Identity(nn.Module):
    """Returns the tokens unchanged, for cross-attention to memory of the encoder's width E."""

    cfg: Model

    def __call__(self, x: Tokens) -> Tokens:
        return x


def _project_merged(cfg: Model, x: Tokens) -> Projected:
    """Projects merged tokens, within a module; `projector.norm` normalizes them first."""
    projector = cfg.projector
    if projector.norm != "none":
        x = Norm(projector.norm, projector.norm_eps, letters="E", name="norm")(x)
    if projector.merge_linear:
        shape = (x.shape[-1], cfg.vision.output_width)
        x = Dense("E E", shape, bias=False, name="merge")(x)
    return _project(cfg, x)


def _project(cfg: Model, x: Tokens) -> Projected:
    """Applies the layers of `projector.projection`, within a module."""
    projector = cfg.projector
    if projector.projection == "mlp":
        return Mlp(cfg, name="mlp")(x)
    return Dense("E D", (x.shape[-1], cfg.decoder.width), bias=projector.bias, name="linear")(x)


def _deepstack_config(cfg: Model) -> Model:
    """Returns the settings that project a hidden state of DeepStack: normalized once merged."""
    return replace(
        cfg,
        vision=replace(cfg.vision, deepstack_layers=()),
        projector=replace(cfg.projector, norm="layernorm"),
    )


class PixelShuffle(nn.Module):
    """Concatenates every f x f square of tokens into one, then projects it (Idefics3).

    (B, P, E) -> (B, P / f^2, D). With `vision.deepstack_layers`, E and D count all hidden states.
    """

    cfg: Model

    @nn.compact
    def __call__(self, x: Tokens) -> Projected:
        f, vision = self.cfg.projector.factor, self.cfg.vision
        if vision.is_native:
            x, *deepstack = jnp.split(x, 1 + len(vision.deepstack_layers), axis=-1)
            # The tokens of a square follow one another already.
            x = einops.rearrange(x, "B (M n) E -> B M (n E)", n=f * f)
            projected = [_project_merged(self.cfg, x)]
            for i, features in enumerate(deepstack):
                layer = PixelShuffle(_deepstack_config(self.cfg), name=f"deepstack_{i}")
                projected.append(layer(features))
            return jnp.concatenate(projected, axis=-1) if deepstack else projected[0]
        rows, columns = self.cfg.vision.grid
        x = einops.rearrange(
            x, "B (h f w g) E -> B (h w) (f g E)", h=rows // f, w=columns // f, f=f, g=f
        )
        return _project_merged(self.cfg, x)


class AveragePool(nn.Module):
    """Averages every f x f square of tokens, then projects it (Gemma 3).

    (B, P, E) -> (B, P / f^2, D).
    """

    cfg: Model

    @nn.compact
    def __call__(self, x: Tokens) -> Projected:
        f = self.cfg.projector.factor
        if self.cfg.vision.is_native:
            x = einops.reduce(x, "B (M n) E -> B M E", "mean", n=f * f)
            return _project_merged(self.cfg, x)
        rows, columns = self.cfg.vision.grid
        x = einops.reduce(
            x, "B (h f w g) E -> B (h w) E", "mean", h=rows // f, w=columns // f, f=f, g=f
        )
        return _project_merged(self.cfg, x)


def _block_settings(cfg: Model) -> tuple[Transformer, Fusion]:
    """Settings of the blocks of a projector with learned queries."""
    projector = cfg.projector
    width = projector.block_width(cfg.vision, cfg.decoder.width)
    settings = Transformer(
        width=width,
        heads=projector.heads,
        head_dim=projector.head_dim,
        mlp_width=projector.block_mlp_width or 4 * width,
        norm_eps=projector.norm_eps,
        activation=projector.block_activation,
        qkv_bias=projector.bias,
        out_bias=projector.bias,
        mlp_bias=projector.bias,
        qk_norm="head" if projector.qk_norm else "none",
    )
    return settings, Fusion("text_only", qk_norm=projector.qk_norm)


def _queries(module: nn.Module, settings: Transformer, rows: int, images: int = 1) -> Projected:
    """Learned queries of a module, a copy for each of the images of each row, (B, I * Q, D)."""
    shape = (module.cfg.projector.queries, settings.width)
    queries = module.param("queries", axes.with_axes(embedding_init, "Q D"), shape)
    return jnp.broadcast_to(jnp.tile(queries, (images, 1)), (rows, images * shape[0], shape[1]))


class _QueryMasks(NamedTuple):
    """Masks with which the queries of an image read it alone; None: a row is one image."""

    patches: Bool[Array, "B 1 Q P"] | None = None
    queries: Bool[Array, "B 1 Q Q"] | None = None

    @property
    def both(self) -> Bool[Array, "B 1 Q T"] | None:
        """Mask over the patches, then the queries."""
        return None if self.patches is None else jnp.concatenate(self, axis=-1)


def _query_masks(queries: int, patch_images: PatchImages, images: int) -> _QueryMasks:
    """Masks for packed patches: a query of image i attends to patches and queries of image i."""
    if patch_images is None:
        return _QueryMasks()
    owners = jnp.repeat(jnp.arange(1, images + 1), queries)  # (I * Q,)
    patches = owners[:, None] == patch_images[:, None]  # (B, I * Q, P)
    own_queries = owners[:, None] == owners
    rows = (len(patch_images), *own_queries.shape)
    return _QueryMasks(patches[:, None], jnp.broadcast_to(own_queries, rows)[:, None])


class Resampler(nn.Module):
    """Learned queries attend to the tokens: (B, P, E) -> (B, Q, D), or packed to (B, I * Q, D).

    At native resolution P are the packed patches of I images, each with queries of its own.

    The Perceiver resampler of Flamingo (Alayrac et al. 2022, appendix A.1.1). Keys and values come
    from tokens and queries together. With `projector.block_norms`, the form of Idefics
    (transformers, models/idefics/perceiver.py).
    """

    cfg: Model

    @nn.compact
    def __call__(self, x: Tokens, patch_images: PatchImages = None, images: int = 1) -> Projected:
        cfg = self.cfg.projector
        if cfg.projection != "none":
            x = _project(self.cfg, x)
        settings, fusion = _block_settings(self.cfg)
        if not cfg.block_norms:
            x = Norm(settings.norm, settings.norm_eps, name="norm")(x)
        sublayers = ("latent" if cfg.block_norms else "cross", "mlp")
        q = _queries(self, settings, len(x), images)
        mask = _query_masks(cfg.queries, patch_images, images).both
        for i in range(cfg.depth):
            memory = x if cfg.block_norms else jnp.concatenate([x, q], axis=1)
            block = Block(settings, sublayers, fusion, name=f"block_{i}")
            q, _ = block(q, BlockInputs(memory=memory, memory_mask=mask), BlockFlags(), {})
        return Norm(settings.norm, settings.norm_eps, name="final_norm")(q)


class QFormer(nn.Module):
    """Learned queries attend to each other and to the tokens, as in BERT: (B, P, E) -> (B, Q, D).

    The Q-Former of BLIP-2 (Li et al. 2023, section 3.1) without its text, and a linear projection.
    Packed patches as in `Resampler`.
    """

    cfg: Model

    @nn.compact
    def __call__(self, x: Tokens, patch_images: PatchImages = None, images: int = 1) -> Projected:
        cfg = self.cfg.projector
        masks = _query_masks(cfg.queries, patch_images, images)
        context = BlockInputs(mask=masks.queries, memory=x, memory_mask=masks.patches)
        settings, fusion = _block_settings(self.cfg)
        settings = replace(settings, norm_position="post")
        q = _queries(self, settings, len(x), images)
        q = Norm(settings.norm, settings.norm_eps, name="norm")(q)
        for i in range(cfg.depth):
            sublayers = ("self", "cross", "mlp") if i % cfg.cross_every == 0 else ("self", "mlp")
            block = Block(settings, sublayers, fusion, name=f"block_{i}")
            q, _ = block(q, context, BlockFlags(), {})
        shape = (settings.width, self.cfg.decoder.width)
        return Dense("E D", shape, bias=cfg.bias, name="linear")(q)


class WithNewline(nn.Module):
    """A projector with the learned vector that ends each row of a tile map (LLaVA-NeXT).

    The parameters of the projector keep their paths.
    """

    cfg: Model

    def setup(self):
        self.tokens = _build(self.cfg)
        nn.share_scope(self, self.tokens)
        cfg, init = self.cfg, axes.with_axes(embedding_init, "D")
        keeps_width = cfg.projector.keeps_width
        width = cfg.vision.output_width if keeps_width else cfg.decoder.width
        self.newline = self.param("newline", init, (width,))

    def __call__(self, x: Tokens) -> Projected:
        return self.tokens(x)


def build_projector(cfg: Model) -> nn.Module:
    """Builds the projector, with `newline` for `vision.tile_grids`."""
    return WithNewline(cfg) if cfg.vision.tile_grids else _build(cfg)


def _build(cfg: Model) -> nn.Module:
    """Builds the class of this file that the row of `projector.kind` names."""
    return globals()[cfg.projector.spec.module](cfg)
