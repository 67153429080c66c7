"""Blocks of sublayers and the loop over depth, shared by the image encoder and the decoder."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import meta

from vlm_jax import axes
from vlm_jax.config import Fusion, Transformer
from vlm_jax.nn.attention import PERTURBATIONS, WEIGHTS, Attention
from vlm_jax.nn.kernels import ATTENTION_CHECKPOINT
from vlm_jax.nn.layers import Mlp, Norm
from vlm_jax.structs import BlockInputs


class Sublayer(NamedTuple):
    """A kind of sublayer in `SUBLAYERS`."""

    kind: Literal["self_attention", "cross_attention", "latent_attention", "mlp"]
    #: belongs to the part cross_attention: is absent without images and masked for tokens without
    #: an image, as `fusion.tokens_without_image` states, and gated if `fusion.has_gates`
    needs_image: bool = False


# By the name of the sublayer's module, with which the names of its norm, gate and scale begin.
SUBLAYERS = {
    "self": Sublayer("self_attention"),
    "mlp": Sublayer("mlp"),
    "cross": Sublayer("cross_attention", needs_image=True),
    "cross_mlp": Sublayer("mlp", needs_image=True),
    "latent": Sublayer("latent_attention"),
}
GATE = "_gate"  # end of the name of a sublayer's gate
LAYERS = "layers"  # name of the scan over depth, which stacks parameters
BLOCK = "block_"  # a block's module is named block_0, block_1, ...
Sublayers = tuple[str, ...]  # names in SUBLAYERS, in the order in which they run
NOT_FUSED = Fusion(kind="text_only")
_policies = jax.checkpoint_policies
_dots = _policies.dots_with_no_batch_dims_saveable
# By `remat`: what of a block is saved besides its input.
SAVED = {
    "attention": _policies.save_from_both_policies(
        _dots, _policies.save_only_these_names(ATTENTION_CHECKPOINT)
    ),
    "dots": _dots,
    "full": _policies.nothing_saveable,
}


def sublayer_of(module: str) -> str | None:
    """Returns the sublayer of a block's module: "cross_mlp" for "cross_mlp_norm"; None: of none."""
    names = [name for name in SUBLAYERS if f"{module}_".startswith(f"{name}_")]
    return max(names, key=len, default=None)


def needs_image(module: str) -> bool:
    """Returns whether a module of a block belongs to a sublayer of cross-attention."""
    sublayer = sublayer_of(module)
    return sublayer is not None and SUBLAYERS[sublayer].needs_image


class BlockFlags(NamedTuple):
    """Differences between blocks that share a compiled program.

    Attributes:
      is_sliding: self-attention has the local mask and the local RoPE.
      has_no_rope: self-attention does not rotate queries and keys; None: all blocks rotate them.
      self_number: number of blocks with self-attention before it; None: DeepStack is not used.
      cross_number: number of blocks with cross-attention before it; None: as `self_number`.
    """

    is_sliding: Any = False
    has_no_rope: Any = None
    self_number: Any = None
    cross_number: Any = None

    def at(self, i: int) -> "BlockFlags":
        """Returns the flags of block i, from the stacked flags of several blocks."""
        return jax.tree.map(lambda flag: flag[i], self)


class Block(nn.Module):
    """A transformer block: a residual branch for each of its sublayers in turn.

        pre       x = x + scale * sublayer(norm(x))
        post      x = norm(x + scale * sublayer(x))
        sandwich  x = x + scale * norm(sublayer(norm(x)))
        output    x = x + scale * norm(sublayer(x))

    `cfg.norm_position` chooses the line and `cfg.layer_scale` the scale. Sublayers of
    cross-attention are scaled by a tanh gate that starts at 0 if `fusion.has_gates` (Alayrac et al.
    2022, Flamingo, section 2.2).
    """

    cfg: Transformer
    sublayers: Sublayers
    fusion: Fusion = NOT_FUSED

    @nn.compact
    def __call__(self, x, context: BlockInputs, flags: BlockFlags, cache: dict):
        """Returns the hidden states (B, S, D), and with a cache keys and values by sublayer."""
        has_memory = context.memory is not None or context.has_image is not None
        new_cache, position = {}, self.cfg.norm_position
        for name in self.sublayers:
            sublayer = SUBLAYERS[name]
            if sublayer.needs_image and not has_memory and not self._has_no_mask(sublayer):
                continue
            y = self._norm(f"{name}_norm", x) if position in ("pre", "sandwich") else x
            if sublayer.kind == "mlp":
                y = Mlp(self.cfg, name=name)(y)
            elif sublayer.kind == "latent_attention":
                y = self._latent_attention(name, y, context)
            elif sublayer.kind == "cross_attention":
                memory = _choose_memory(context, flags)
                y, new_cache[name] = self._cross_attention(
                    name, y, memory, context.memory_mask, cache.get(name)
                )
            else:
                y, new_cache[name] = self._self_attention(name, y, context, flags, cache.get(name))
            if position in ("sandwich", "output"):
                y = self._norm(f"{name}_post_norm", y)
            y = self._scale_residual(name, self._mask_tokens_without_image(sublayer, y, context))
            x = axes.constrain(x + y, "B S D")
            if position == "post":
                x = self._norm(f"{name}_norm", x)
        return x, (new_cache if context.index is not None else {})

    def _norm(self, name, x):
        return Norm(self.cfg.norm, self.cfg.norm_eps, name=name)(x)

    def _self_attention(self, name, x, context: BlockInputs, flags: BlockFlags, cache):
        mask, rope, pattern = context.mask, context.rope, context.pattern
        if context.local_mask is not None:
            mask = jnp.where(flags.is_sliding, context.local_mask, mask)
            pattern = pattern and pattern.in_block(flags.is_sliding)
        if context.local_rope is not None:
            rope = jax.tree.map(
                lambda local, other: jnp.where(flags.is_sliding, local, other),
                context.local_rope,
                rope,
            )
        if flags.has_no_rope is not None:
            cos, sin = rope
            rope = jnp.where(flags.has_no_rope, 1, cos), jnp.where(flags.has_no_rope, 0, sin)
        attention = Attention(self.cfg, self.cfg.qk_norm, name=name)
        return attention(x, x, mask, rope, cache, context.index, pattern)

    def _cross_attention(self, name, x, memory, mask, cache):
        # While decoding, keys and values of the memory are in the cache.
        cache = cache if memory is None else None
        attention = Attention(self.cfg, self._qk_norm, name=name)
        return attention(x, memory, mask, cache=cache)

    def _latent_attention(self, name, x, context: BlockInputs):
        """Attention to the normalized memory and to `x` (Jaegle et al. 2022, Perceiver IO)."""
        memory = self._norm(f"{name}_memory_norm", context.memory)
        attention = Attention(self.cfg, self._qk_norm, name=name)
        return attention(x, jnp.concatenate([memory, x], axis=1), context.memory_mask)[0]

    @property
    def _qk_norm(self) -> str:
        """Value of `Transformer.qk_norm` for attention to memory."""
        return "head" if self.fusion.qk_norm else "none"

    def _has_no_mask(self, sublayer: Sublayer) -> bool:
        """Returns whether a sublayer of cross-attention applies to tokens without an image, too."""
        return sublayer.kind == "mlp" and self.fusion.tokens_without_image == "mask_attention"

    def _mask_tokens_without_image(self, sublayer: Sublayer, y, context: BlockInputs):
        """Zeroes what a sublayer of cross-attention would add to a token without an image.

        With `fusion.tokens_without_image` "attend_all" such tokens pass the attention, and only
        their MLP is zeroed; with "mask_attention" only their attention is.
        """
        mask = context.has_image
        if sublayer.kind == "cross_attention" and context.attends is not None:
            mask = context.attends
        if not sublayer.needs_image or self._has_no_mask(sublayer) or mask is None:
            return y
        return jnp.where(mask[..., None], y, 0)

    def _scale_residual(self, name, y):
        if self.cfg.layer_scale == "vector":
            init = axes.with_axes(nn.initializers.ones, "D")
            return y * self.param(f"{name}_scale", init, y.shape[-1:])
        is_gated = SUBLAYERS[name].needs_image and self.fusion.has_gates
        if self.cfg.layer_scale == "tanh_gate" or is_gated:
            letter, size = "1", 1
            if is_gated and self.fusion.gate == "vector":
                letter, size = "D", y.shape[-1]
            init = axes.with_axes(nn.initializers.zeros, letter)
            return y * jnp.tanh(self.param(f"{name}{GATE}", init, (size,)))
        return y


def repeating_period(blocks: tuple[Sublayers, ...]) -> tuple[Sublayers, ...]:
    """Returns the shortest pattern that the stack repeats, such as (cross, self, mlp)."""
    for length in range(1, len(blocks) + 1):
        if len(blocks) % length == 0 and blocks == blocks[:length] * (len(blocks) // length):
            return blocks[:length]
    return ()


class ScanBlock(nn.Module):
    """One iteration of the scan over depth: the blocks of one repeating pattern.

    Outputs of the layers in `return_layers` are carried along.
    """

    cfg: Transformer
    blocks: tuple[Sublayers, ...]
    fusion: Fusion
    return_layers: tuple[int, ...]

    @nn.compact
    def __call__(self, carry, context: BlockInputs, scan_step, flags: BlockFlags, cache: list):
        x, hidden_states = carry
        new_cache, block_class = [], self._block_class()
        for i, sublayers in enumerate(self.blocks):
            block = block_class(self.cfg, sublayers, self.fusion, name=f"block_{i}")
            x, block_cache = block(x, context, flags.at(i), cache[i])
            new_cache.append(block_cache)
            self.sow("intermediates", f"block_{i}_out", x)
            if context.deepstack is not None and "self" in sublayers:
                added = _take_level(context.deepstack, flags.self_number[i], 0)
                x = x + added.astype(x.dtype)
            layer = scan_step * len(self.blocks) + i + 1
            hidden_states = [
                jnp.where(layer == number, x, old)
                for number, old in zip(self.return_layers, hidden_states)
            ]
        return (x, hidden_states), new_cache

    def _block_class(self):
        """Rematerializes block by block (Chen et al. 2016), however many a pattern has.

        The forward and the backward pass are separate loops, so common subexpressions are never
        shared between them; barriers against that are needed only where the loop is unrolled.
        """
        if self.cfg.remat == "none":
            return Block
        return nn.remat(Block, policy=SAVED[self.cfg.remat], prevent_cse=self.cfg.unroll > 1)


def _choose_memory(context: BlockInputs, flags: BlockFlags):
    """Returns the image tokens that a cross-attention reads, (B, T, D); None: they are cached."""
    if context.deepstack_memory is None:
        return context.memory
    return _take_level(context.deepstack_memory, flags.cross_number, context.memory)


def _take_level(levels, number, beyond):
    """Returns levels[number] of (L, ...), or `beyond` from number L on."""
    last = len(levels) - 1
    level = jax.lax.dynamic_index_in_dim(levels, jnp.minimum(number, last), keepdims=False)
    return jnp.where(number <= last, level, beyond)


class Stack(nn.Module):
    """All blocks: a scan over the repeating pattern, so that compile time does not grow with depth.

    Parameters and caches of block i of the pattern are stacked over L, the iterations of the scan.
    """

    cfg: Transformer
    blocks: tuple[Sublayers, ...]
    fusion: Fusion = NOT_FUSED
    sliding: tuple[int, ...] = ()  # blocks whose self-attention has the local mask and RoPE
    no_rope: tuple[int, ...] = ()  # blocks whose self-attention has no RoPE
    #: hidden states to return: 0 is the input, n the output of block n (from 1), -1 of the last
    return_layers: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x, context: BlockInputs, cache: list | None = None):
        """Returns the output (B, S, D), hidden states of `return_layers`, and the new cache."""
        period, count = repeating_period(self.blocks), len(self.blocks)
        steps = count // len(period)
        # One compiled body for each pattern.
        scan = nn.scan(
            ScanBlock,
            variable_axes={"params": 0, "intermediates": 0, WEIGHTS: 0, PERTURBATIONS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, 0, 0),
            length=steps,
            # The check traces each block once more; a block computes nothing that has to pass it.
            check_constancy_invariants=False,
            unroll=min(self.cfg.unroll, steps),
            metadata_params={meta.PARTITION_NAME: "L"},
        )
        return_layers = tuple(layer % (count + 1) for layer in self.return_layers)
        layers = scan(self.cfg, period, self.fusion, return_layers, name=LAYERS)
        (x, hidden_states), cache = layers(
            (x, [x] * len(return_layers)),
            context,
            jnp.arange(steps),
            self._flags(steps, len(period), context),
            cache or [{} for _ in period],
        )
        return x, hidden_states, cache

    def _flags(self, steps: int, period: int, context: BlockInputs) -> BlockFlags:
        """Flags of all blocks, each an array (L, length of the pattern)."""

        def names(blocks):
            return jnp.array([i in blocks for i in range(steps * period)]).reshape(steps, period)

        def numbers(sublayer):
            has_sublayer = np.array([sublayer in sublayers for sublayers in self.blocks])
            before = np.cumsum(has_sublayer) - has_sublayer
            return jnp.array(before.reshape(steps, period))

        flags = BlockFlags(names(self.sliding), names(self.no_rope) if self.no_rope else None)
        if context.deepstack is not None:
            flags = flags._replace(self_number=numbers("self"))
        if context.deepstack_memory is not None:
            flags = flags._replace(cross_number=numbers("cross"))
        return flags
