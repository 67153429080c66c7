"""One decoder for every fusion style and public family: blocks of sublayers between an embedding and a head."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax.config import ConfigError, Fusion
from vlm_jax.config import Decoder as DecoderConfig
from vlm_jax.nn.blocks import Stack, repeating_period
from vlm_jax.nn.layers import (
    Dense,
    Embed,
    Norm,
    softcap,
)
from vlm_jax.nn.positions import local_rope_tables, rope_tables, sinusoidal_embedding
from vlm_jax.structs import BlockInputs, Cache, DecoderInputs


class Decoder(nn.Module):
    """Token ids -> embeddings (`embed`), a stream -> hidden numbers (`__call__`), those -> logits (`head`)."""

    cfg: DecoderConfig
    fusion: Fusion

    def setup(self):
        cfg = self.cfg
        self.embedding = Embed(cfg.vocab_size + cfg.extra_tokens, cfg.width)
        if cfg.positions == "learned":
            self.position_embedding = Embed(
                cfg.max_positions + cfg.position_offset, cfg.width, letters="S D"
            )
        if cfg.embed_norm:
            self.embedding_norm = Norm(cfg.norm, cfg.norm_eps)
        self.blocks = Stack(
            cfg, self.fusion.sublayers(cfg.depth), self.fusion, self.sliding_blocks()
        )
        if cfg.final_norm:
            self.final_norm = Norm(cfg.norm, cfg.norm_eps)
        if not cfg.tie_word_embeddings:
            self.free_head = Dense("D V", (cfg.width, cfg.vocab_size), bias=False)

    def sliding_blocks(self) -> tuple[int, ...]:
        """`sliding_layers` count decoder blocks; the stack counts cross-attention blocks that stand alone, too."""
        with_self = [
            i for i, block in enumerate(self.fusion.sublayers(self.cfg.depth)) if "self" in block
        ]
        return tuple(with_self[i] for i in self.cfg.sliding_layers)

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        x = self.embedding(tokens)
        return x * jnp.asarray(math.sqrt(self.cfg.width), x.dtype) if self.cfg.embed_scale else x

    def __call__(
        self, stream: DecoderInputs, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Returns the hidden numbers after the final norm, and the cache with what was read.

        With longrope, the first token beyond `original_positions` makes all of them be read again: from there on other
        angles turn every token, and the blocks make other keys and values of them (transformers, modeling_phi3.py).
        """
        rope = self.cfg.rope
        if (
            cache is None
            or rope.scaling != "longrope"
            or cache.positions.shape[1] < rope.original_positions
        ):
            return self._read(stream, cache)
        is_prefill, cache = cache.seen is None, remember(stream, cache)
        if is_prefill:
            return self._read(stream, cache)
        before = jnp.where(
            jnp.arange(cache.positions.shape[1]) < cache.index, cache.positions, 0
        ).max()
        outgrown = (before < rope.original_positions) & (
            stream.positions.max() >= rope.original_positions
        )
        return nn.cond(
            outgrown, Decoder._read_again, Decoder._read, self, stream, cache, variables="params"
        )

    def _read_again(self, stream: DecoderInputs, cache: Cache):
        """As `_read`, after everything that the cache has seen."""
        hidden, whole = self._read(cache.seen, cache.replace(index=jnp.zeros_like(cache.index)))
        length = stream.x.shape[1]
        hidden = jax.lax.dynamic_slice_in_dim(hidden, cache.index, length, axis=1)
        return hidden, whole.replace(index=cache.index + length)

    def _read(self, stream: DecoderInputs, cache: Cache | None):
        cfg, positions = self.cfg, stream.positions
        x = (
            stream.x + self._positions(positions).astype(stream.x.dtype)
            if cfg.positions != "rope"
            else stream.x
        )
        if cfg.embed_norm:
            x = self.embedding_norm(x)
        context = BlockInputs(
            mask=stream.mask,
            rope=rope_tables(positions, cfg) if cfg.positions == "rope" else None,
            memory=stream.memory,
            memory_mask=stream.memory_mask,
            has_image=stream.has_image,
            attends=stream.attends,
            local_mask=stream.local_mask,
            local_rope=local_rope_tables(positions, cfg) if cfg.rope.local_theta else None,
            index=cache.index if cache else None,
        )
        self.sow("intermediates", "embeddings", x)
        x, _, layers = self.blocks(x, context, cache.layers if cache else None)
        if cache is not None:
            cache = cache.replace(index=cache.index + x.shape[1], layers=layers)
        return self.final_norm(x) if cfg.final_norm else x, cache

    def _positions(self, positions):
        rows = positions + self.cfg.position_offset
        if self.cfg.positions == "learned":
            check_length(self.cfg, positions.shape[1])
            return self.position_embedding(rows)
        return jnp.where(positions[..., None] < 0, 0.0, sinusoidal_embedding(rows, self.cfg.width))

    def head(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        logits = self.embedding.attend(x) if self.cfg.tie_word_embeddings else self.free_head(x)
        return softcap(logits, self.cfg.logit_softcap)


def check_length(cfg: DecoderConfig, length: int) -> None:
    """Raises ConfigError if a table of learned positions has fewer rows than `length`; other positions have no end."""
    if cfg.positions == "learned" and length > cfg.max_positions:
        raise ConfigError(
            f"{length} tokens are too many: the model has {cfg.max_positions} positions."
        )


def remember(stream: DecoderInputs, cache: Cache) -> Cache:
    """The cache with a stream of all its slots: what was seen before, and `stream` from slot `index` on."""
    slots = cache.positions.shape[1]

    def written(new, old=None):
        axis = 1 if new.ndim < 4 else 2  # (B, S, ...), or (B, 1, S, T)
        if old is None:
            old = jnp.zeros((*new.shape[:axis], slots, *new.shape[axis + 1 :]), new.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, new, cache.index, axis)

    before = [] if cache.seen is None else [cache.seen]
    return cache.replace(seen=jax.tree.map(written, stream.replace(memory=None), *before))


def empty_layers(
    cfg: DecoderConfig, fusion: Fusion, rows: int, length: int, dtype=jnp.float32
) -> list:
    """Zeroed keys and values of `length` slots for every self-attention, stacked as `Stack` wants them."""
    blocks = fusion.sublayers(cfg.depth)
    period = repeating_period(blocks)
    shape = (len(blocks) // len(period), rows, cfg.num_kv_heads, length, cfg.head_width)
    return [{"self": (jnp.zeros(shape, dtype),) * 2} if "self" in block else {} for block in period]
