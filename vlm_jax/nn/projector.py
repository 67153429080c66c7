"""Projectors: map the encoder's tokens to the decoder's width.

A new projector is one class here and one row of `PROJECTORS` in config/model.py, which names the
class and states how many tokens it emits (`config.Projector.num_tokens`). It maps (B, P, E) to
(B, M, D).
"""

from dataclasses import replace

import einops
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.config import Model, Transformer
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
    """Projects merged tokens, within a module; `projector.norm` normalises them first."""
    projector = cfg.projector
    if projector.norm != "none":
        x = Norm(projector.norm, projector.norm_eps, letters="E", name="norm")(x)
    if projector.merge_linear:
        shape = (x.shape[-1], cfg.vision.output_width)
        x = Dense("E E", shape, bias=False, name="merge")(x)
    if projector.projection == "mlp":
        return Mlp(cfg, name="mlp")(x)
    return Dense("E D", (x.shape[-1], cfg.decoder.width), bias=projector.bias, name="linear")(x)


def _deepstack_config(cfg: Model) -> Model:
    """Returns the settings that project a hidden state of DeepStack: normalised once merged."""
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


class Resampler(nn.Module):
    """Learned queries attend to the tokens: (B, P, E) -> (B, Q, D).

    The Perceiver resampler of Flamingo (Alayrac et al. 2022, appendix A.1.1). Keys and values come
    from tokens and queries together.
    """

    cfg: Model

    @nn.compact
    def __call__(self, x: Tokens) -> Projected:
        cfg, width = self.cfg.projector, self.cfg.decoder.width
        settings = Transformer(width=width, heads=cfg.heads, mlp_width=4 * width)
        memory = Norm("layernorm", settings.norm_eps, name="norm")(
            Dense("E D", (x.shape[-1], width), name="linear")(x)
        )
        queries = self.param("queries", axes.with_axes(embedding_init, "Q D"), (cfg.queries, width))
        q = jnp.broadcast_to(queries, (len(x), *queries.shape))
        for i in range(cfg.depth):
            context = BlockInputs(memory=jnp.concatenate([memory, q], axis=1))
            q, _ = Block(settings, ("cross", "mlp"), name=f"block_{i}")(
                q, context, BlockFlags(), {}
            )
        return Norm("layernorm", settings.norm_eps, name="final_norm")(q)


class WithNewline(nn.Module):
    """A projector with the learned vector that ends each row of a tile map (LLaVA-NeXT).

    The parameters of the projector keep their paths.
    """

    cfg: Model

    def setup(self):
        self.tokens = _build(self.cfg)
        nn.share_scope(self, self.tokens)
        init = axes.with_axes(embedding_init, "D")
        self.newline = self.param("newline", init, (self.cfg.decoder.width,))

    def __call__(self, x: Tokens) -> Projected:
        return self.tokens(x)


def build_projector(cfg: Model) -> nn.Module:
    """Builds the projector, with `newline` for `vision.tile_grids`."""
    return WithNewline(cfg) if cfg.vision.tile_grids else _build(cfg)


def _build(cfg: Model) -> nn.Module:
    """Builds the class of this file that the row of `projector.kind` names."""
    return globals()[cfg.projector.spec.module](cfg)
