"""Blocks of sublayers and the loop over depth, shared by the image encoder and the decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import meta

from vlm_jax import axes
from vlm_jax.config import Fusion, Transformer
from vlm_jax.nn.attention import Attention
from vlm_jax.nn.kernels import ATTENTION_CHECKPOINT
from vlm_jax.nn.layers import Mlp, Norm
from vlm_jax.structs import BlockInputs

Sublayers = tuple[str, ...]
ATTENTION = ("self", "cross")
NOT_FUSED = Fusion(kind="text_only")
_policies = jax.checkpoint_policies
_dots = _policies.dots_with_no_batch_dims_saveable
SAVED = {  # by `remat`: what of a block is kept beside its input
    "attention": _policies.save_from_both_policies(
        _dots, _policies.save_only_these_names(ATTENTION_CHECKPOINT)
    ),
    "dots": _dots,
    "full": _policies.nothing_saveable,
}


class Block(nn.Module):
    """x <- x + sublayer(norm(x)) for each of its sublayers; the `cross` ones read the memory.

    `self` attends to the sequence, `cross` to the memory, `mlp` and `cross_mlp` are alike but for the part they belong
    to: `cross` and `cross_mlp` are cross-attention's, behind a tanh gate that starts at 0 where `fusion.has_gates`
    (Alayrac et al. 2022, Flamingo, section 2.2). A token that reads no image gets nothing from them (from `cross_mlp`
    alone where `fusion.tokens_without_image` is "attend_all"), and without a memory they are not there at all.
    `cfg.norm_position` moves the norm, `cfg.layer_scale` scales what is added.
    """

    cfg: Transformer
    sublayers: Sublayers
    fusion: Fusion = NOT_FUSED

    @nn.compact
    def __call__(self, x, context: BlockInputs, slides, cache: dict):
        new_cache, order = {}, self.cfg.norm_position
        for name in self.sublayers:
            if name.startswith("cross") and context.memory is None and context.memory_mask is None:
                continue
            y = x if order == "post" else self._norm(f"{name}_norm", x)
            if name in ATTENTION:
                y, new_cache[name] = self._attention(name, y, context, slides, cache.get(name))
            else:
                y = Mlp(self.cfg, name=name)(y)
            if order == "sandwich":
                y = self._norm(f"{name}_post_norm", y)
            x = axes.constrain(x + self._scaled(name, self._seen(name, y, context)), "B S D")
            if order == "post":
                x = self._norm(f"{name}_norm", x)
        return x, (new_cache if context.index is not None else {})

    def _norm(self, name, x):
        return Norm(self.cfg.norm, self.cfg.norm_eps, name=name)(x)

    def _attention(self, name, x, context: BlockInputs, slides, cache):
        if name == "cross":
            attention = Attention(self.cfg, self.fusion.qk_norm, name=name)
            return attention(
                x,
                context.memory,
                context.memory_mask,
                cache=None if context.memory is not None else cache,
            )
        mask, rope = context.mask, context.rope
        if context.local_mask is not None:
            mask = jnp.where(slides, context.local_mask, mask)
        if context.local_rope is not None:
            rope = jax.tree.map(
                lambda local, whole: jnp.where(slides, local, whole), context.local_rope, rope
            )
        return Attention(self.cfg, self.cfg.qk_norm, name=name)(
            x, x, mask, rope, cache, context.index
        )

    def _seen(self, name, y, context: BlockInputs):
        """Zeroes what a cross sublayer would add to a token that does not pass it."""
        passes = context.reads
        if name == "cross" and context.attends is not None:
            passes = context.attends
        if not name.startswith("cross") or passes is None:
            return y
        return jnp.where(passes[..., None], y, 0)

    def _scaled(self, name, y):
        if self.cfg.layer_scale == "vector":
            return y * self.param(
                f"{name}_scale", axes.with_axes(nn.initializers.ones, "D"), y.shape[-1:]
            )
        if self.cfg.layer_scale == "tanh_gate" or (
            name.startswith("cross") and self.fusion.has_gates
        ):
            return y * jnp.tanh(
                self.param(f"{name}_gate", axes.with_axes(nn.initializers.zeros, "1"), (1,))
            )
        return y


def repeating_period(blocks: tuple[Sublayers, ...]) -> tuple[Sublayers, ...]:
    """The shortest run of blocks that the stack repeats."""
    for length in range(1, len(blocks) + 1):
        if len(blocks) % length == 0 and blocks == blocks[:length] * (len(blocks) // length):
            return blocks[:length]
    return ()


class ScanBlock(nn.Module):
    """One turn of the loop over depth: its blocks in turn, each output noted where `wanted` asks for it."""

    cfg: Transformer
    blocks: tuple[Sublayers, ...]
    fusion: Fusion
    wanted: tuple[int, ...]

    @nn.compact
    def __call__(self, carry, context: BlockInputs, turn, slides, cache: list):
        (x, kept), new_cache, block_class = carry, [], self._block_class()
        for i, sublayers in enumerate(self.blocks):
            block = block_class(self.cfg, sublayers, self.fusion, name=f"block_{i}")
            x, block_cache = block(x, context, slides[i], cache[i])
            new_cache.append(block_cache)
            self.sow("intermediates", f"block_{i}_out", x)
            number = turn * len(self.blocks) + i + 1
            kept = [jnp.where(number == layer, x, old) for layer, old in zip(self.wanted, kept)]
        return (x, kept), new_cache

    def _block_class(self):
        """Each block for itself is computed again (Chen et al. 2016), however many a period has.

        Forward and backward pass are loops of their own, so nothing is shared between them by common subexpressions;
        the barriers that prevent it are needed only where the loop is laid out.
        """
        if self.cfg.remat == "none":
            return Block
        return nn.remat(Block, policy=SAVED[self.cfg.remat], prevent_cse=self.cfg.unroll > 1)


class Stack(nn.Module):
    """All blocks: a loop over the repeating period, so that compile time does not grow with depth.

    Parameters and caches of block i of the period are stacked over L, the turns of the loop. Beside the output it
    returns the hidden states that `wanted` names: 0 is the input, n the output of block n (from 1), -1 of the last.
    """

    cfg: Transformer
    blocks: tuple[Sublayers, ...]
    fusion: Fusion = NOT_FUSED
    sliding: tuple[int, ...] = ()  # the blocks whose self-attention uses the local mask and RoPE
    wanted: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x, context: BlockInputs, cache: list | None = None):
        period, count = repeating_period(self.blocks), len(self.blocks)
        turns = count // len(period)
        loop = nn.scan(
            ScanBlock,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0, 0),
            length=turns,
            unroll=min(self.cfg.unroll, turns),
            metadata_params={meta.PARTITION_NAME: "L"},
        )
        wanted = tuple(layer % (count + 1) for layer in self.wanted)
        slides = jnp.array([i in self.sliding for i in range(count)]).reshape(turns, len(period))
        layers = loop(self.cfg, period, self.fusion, wanted, name="layers")
        (x, kept), cache = layers(
            (x, [x] * len(wanted)),
            context,
            jnp.arange(turns),
            slides,
            cache or [{} for _ in period],
        )
        return x, kept, cache
