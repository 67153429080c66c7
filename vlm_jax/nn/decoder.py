"""One decoder for every fusion style and public family: embedding, blocks, output head."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax.config import ConfigError, Fusion
from vlm_jax.config import Decoder as DecoderConfig
from vlm_jax.nn import longrope
from vlm_jax.nn.blocks import Stack, repeating_period
from vlm_jax.nn.layers import Dense, Embed, Norm, softcap
from vlm_jax.nn.positions import local_rope_tables, rope_tables, sinusoidal_embedding
from vlm_jax.structs import BlockInputs, Cache, DecoderInputs


class Decoder(nn.Module):
    """Token ids -> embeddings (`embed`) -> hidden states (`__call__`) -> logits (`head`).

    Fusion runs between `embed` and `__call__`: it adds the image tokens and the masks.
    """

    cfg: DecoderConfig
    fusion: Fusion

    def setup(self):
        cfg = self.cfg
        self.embedding = Embed(cfg.vocab_size + cfg.extra_tokens, cfg.width)
        if cfg.added_tokens:
            self.added_embedding = Embed(cfg.added_tokens, cfg.width)
        if cfg.positions == "learned":
            rows = cfg.max_positions + cfg.position_offset
            self.position_embedding = Embed(rows, cfg.width, letters="S D")
        if cfg.embed_norm:
            self.embedding_norm = Norm(cfg.norm, cfg.norm_eps)
        sublayers = self.fusion.sublayers(cfg.depth)
        self.blocks = Stack(
            cfg,
            sublayers,
            self.fusion,
            sliding=self._stack_indices(cfg.sliding_layers),
            no_rope=self._stack_indices(cfg.no_rope_layers),
        )
        if cfg.final_norm:
            self.final_norm = Norm(cfg.norm, cfg.norm_eps)
        if not cfg.tie_word_embeddings:
            self.free_head = Dense("D V", (cfg.width, cfg.vocab_size), bias=False)
            if cfg.added_tokens:
                self.added_head = Dense("D V", (cfg.width, cfg.added_tokens), bias=False)

    def _stack_indices(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Indices in the stack of some blocks of the decoder.

        `layers` counts blocks with self-attention only; the stack also has blocks of
        cross-attention alone.
        """
        blocks = self.fusion.sublayers(self.cfg.depth)
        with_self_attention = [i for i, sublayers in enumerate(blocks) if "self" in sublayers]
        return tuple(with_self_attention[layer] for layer in layers)

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Token embeddings, without positions."""
        vocab = self.cfg.vocab_size
        if self.cfg.added_tokens:
            x = jnp.where(
                (tokens < vocab)[..., None],
                self.embedding(jnp.minimum(tokens, vocab - 1)),
                self.added_embedding(jnp.maximum(tokens - vocab, 0)),
            )
        else:
            x = self.embedding(tokens)
        if self.cfg.embed_scale:
            x = x * jnp.asarray(math.sqrt(self.cfg.width), x.dtype)
        return x

    def __call__(
        self, inputs: DecoderInputs, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Returns the hidden states after the final norm and the updated KV cache.

        With a cache, `inputs` are the tokens that follow the cached ones.
        """
        cache, is_stale = longrope.prepare_cache(self.cfg.rope, inputs, cache)
        if is_stale is None:
            return self._forward(inputs, cache)
        return nn.cond(
            is_stale,
            Decoder._recompute_cache,
            Decoder._forward,
            self,
            inputs,
            cache,
            variables="params",
        )

    def _recompute_cache(self, inputs: DecoderInputs, cache: Cache):
        """`_forward` of `inputs` after new keys and values for all tokens before them."""
        length = inputs.x.shape[1]
        first_slot = jnp.zeros_like(cache.index)
        hidden, new_cache = self._forward(cache.inputs, cache.replace(index=first_slot))
        # `cache.inputs` has all slots, the free ones included: keep the hidden states of `inputs`.
        hidden = jax.lax.dynamic_slice_in_dim(hidden, cache.index, length, axis=1)
        return hidden, new_cache.replace(index=cache.index + length)

    def _forward(self, inputs: DecoderInputs, cache: Cache | None):
        cfg, positions = self.cfg, inputs.positions
        check_length(cfg, positions.shape[1])
        has_local_rope = cfg.rope.local_theta is not None
        x = inputs.x
        if cfg.positions != "rope":
            x = x + self._position_embedding(positions).astype(x.dtype)
        if cfg.embed_norm:
            x = self.embedding_norm(x)
        block_inputs = BlockInputs(
            mask=inputs.mask,
            pattern=inputs.pattern,
            rope=self._rope(inputs),
            deepstack=inputs.deepstack,
            memory=inputs.memory,
            deepstack_memory=inputs.deepstack_memory,
            memory_mask=inputs.memory_mask,
            has_image=inputs.has_image,
            attends=inputs.attends,
            local_mask=inputs.local_mask,
            local_rope=local_rope_tables(positions, cfg) if has_local_rope else None,
            index=cache.index if cache else None,
        )
        self.sow("intermediates", "embeddings", x)
        x, _, layers = self.blocks(x, block_inputs, cache.layers if cache else None)
        if cache is not None:
            cache = cache.replace(index=cache.index + x.shape[1], layers=layers)
        if cfg.final_norm:
            x = self.final_norm(x)
        return x, cache

    def _rope(self, inputs: DecoderInputs):
        """Cosines and sines, or None without RoPE."""
        if self.cfg.positions != "rope":
            return None
        if self.cfg.rope.sections and inputs.rope_positions is not None:
            return rope_tables(inputs.rope_positions, self.cfg)
        return rope_tables(inputs.positions, self.cfg)

    def _position_embedding(self, positions):
        """(B, S) -> (B, S, D), learned or sinusoidal."""
        rows = positions + self.cfg.position_offset
        if self.cfg.positions == "learned":
            return self.position_embedding(rows)
        # Padding has position -1 and no embedding (TrOCR).
        return jnp.where(positions[..., None] < 0, 0.0, sinusoidal_embedding(rows, self.cfg.width))

    def head(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Logits of the next token."""
        cfg = self.cfg
        logits = self.embedding.attend(x) if cfg.tie_word_embeddings else self.free_head(x)
        if cfg.added_tokens:
            is_tied = cfg.tie_word_embeddings
            added = self.added_embedding.attend(x) if is_tied else self.added_head(x)
            logits = jnp.concatenate([logits, added], axis=-1)
        return softcap(logits, cfg.logit_softcap)


def check_length(cfg: DecoderConfig, length: int) -> None:
    """Raises ConfigError if `length` tokens exceed the positions of the model.

    Sinusoidal positions and most kinds of RoPE have no maximum.
    """
    if cfg.limits_positions and length > cfg.max_positions:
        raise ConfigError(
            f"{length} tokens are too many: the model has {cfg.max_positions} positions."
        )


def empty_layers(
    cfg: DecoderConfig, fusion: Fusion, rows: int, length: int, dtype=jnp.float32
) -> list:
    """Zeroed keys and values of `length` slots for every self-attention, as `Stack` takes them.

    Returns:
      For each block of the repeating period: {"self": (keys, values)}, (L, B, K, length, H) each,
      or {} without self-attention.
    """
    blocks = fusion.sublayers(cfg.depth)
    period = repeating_period(blocks)
    repeats = len(blocks) // len(period)
    zeros = jnp.zeros((repeats, rows, cfg.num_kv_heads, length, cfg.head_width), dtype)
    return [{"self": (zeros, zeros)} if "self" in sublayers else {} for sublayers in period]
