"""Blocks of sublayers and the loop over depth, shared by the image encoder and the decoder."""

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import meta

from vlm_jax import axes
from vlm_jax.config import Transformer
from vlm_jax.nn.attention import Attention
from vlm_jax.nn.layers import Mlp, Norm
from vlm_jax.structs import Context

Sublayers = tuple[str, ...]
ATTENTION = ("self", "cross")


class Block(nn.Module):
    """x <- x + sublayer(norm(x)) for each of its sublayers; the `cross` ones read the memory.

    `self` attends to the sequence, `cross` to the memory, `mlp` and `cross_mlp` are alike but for the part they belong
    to: `cross` and `cross_mlp` are cross-attention's, behind a tanh gate that starts at 0 where `gated` (Alayrac et al.
    2022, Flamingo, section 2.2). A token that reads no image gets nothing from them, and without a memory they are not
    there at all.
    """

    cfg: Transformer
    sublayers: Sublayers
    gated: bool = False

    @nn.compact
    def __call__(self, x, context: Context, cache: dict):
        new_cache = {}
        for name in self.sublayers:
            crossing = name.startswith("cross")
            if crossing and context.memory is None and context.memory_mask is None:
                continue
            y = Norm(self.cfg.norm, self.cfg.norm_eps, name=f"{name}_norm")(x)
            if name in ATTENTION:
                y, new_cache[name] = self._attention(name, y, context, cache.get(name))
            else:
                y = Mlp(self.cfg, name=name)(y)
            if crossing:
                y = self._gate(name, y, context)
            x = axes.constrain(x + y, "B S D")
        return x, (new_cache if cache else {})

    def _attention(self, name, x, context: Context, cache):
        attention = Attention(self.cfg, name=name)
        if name == "self":
            return attention(x, x, context.mask, context.rope, cache, context.index)
        return attention(x, context.memory, context.memory_mask, cache=None if context.memory is not None else cache)

    def _gate(self, name, y, context: Context):
        if self.gated:
            y *= jnp.tanh(self.param(f"{name}_gate", axes.lettered(nn.initializers.zeros, "1"), (1,)))
        if context.memory_mask is None:
            return y
        reads_an_image = context.memory_mask.any(axis=-1)[:, 0, :, None]
        return jnp.where(reads_an_image, y, 0)


def repeating_period(blocks: tuple[Sublayers, ...]) -> tuple[Sublayers, ...]:
    """The shortest run of blocks that the stack repeats."""
    for length in range(1, len(blocks) + 1):
        if len(blocks) % length == 0 and blocks == blocks[:length] * (len(blocks) // length):
            return blocks[:length]
    return ()


class Period(nn.Module):
    """One turn of the loop over depth."""

    cfg: Transformer
    blocks: tuple[Sublayers, ...]
    gated: bool

    @nn.compact
    def __call__(self, x, context: Context, cache: list):
        new_cache = []
        for i, sublayers in enumerate(self.blocks):
            x, block_cache = Block(self.cfg, sublayers, self.gated, name=f"block_{i}")(x, context, cache[i])
            new_cache.append(block_cache)
        return x, new_cache


class Stack(nn.Module):
    """All blocks: a loop over the repeating period, so that compile time does not grow with depth.

    Parameters and caches of block i of the period are stacked over L, the turns of the loop.
    """

    cfg: Transformer
    blocks: tuple[Sublayers, ...]
    gated: bool = False

    @nn.compact
    def __call__(self, x, context: Context, cache: list | None = None):
        period = repeating_period(self.blocks)
        turns = len(self.blocks) // len(period)
        loop = nn.scan(
            Period,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=turns,
            unroll=min(self.cfg.unroll, turns),
            metadata_params={meta.PARTITION_NAME: "L"},
        )
        return loop(self.cfg, period, self.gated, name="layers")(x, context, cache or [{} for _ in period])
