"""One decoder for every fusion style and public family: blocks of sublayers between an embedding and a head."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax.config import Decoder as DecoderConfig
from vlm_jax.config import Fusion
from vlm_jax.nn.attention import rope_tables
from vlm_jax.nn.blocks import Stack, repeating_period
from vlm_jax.nn.layers import Dense, Embed, Norm
from vlm_jax.structs import Cache, Context, Stream


class Decoder(nn.Module):
    """Token ids -> embeddings (`embed`), a stream -> hidden numbers (`__call__`), those -> logits (`head`)."""

    cfg: DecoderConfig
    fusion: Fusion

    def setup(self):
        cfg = self.cfg
        self.embedding = Embed(cfg.vocab_size, cfg.width)
        if cfg.positions == "learned":
            self.position_embedding = Embed(cfg.max_positions, cfg.width, letters="S D")
        self.blocks = Stack(cfg, self.fusion.sublayers(cfg.depth), self.fusion.has_gates)
        self.final_norm = Norm(cfg.norm, cfg.norm_eps)
        if not cfg.tied_head:
            self.free_head = Dense("D V", (cfg.width, cfg.vocab_size), bias=False)

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return self.embedding(tokens)

    def __call__(self, stream: Stream, cache: Cache | None = None) -> tuple[Float[Array, "B S D"], list]:
        """Returns the hidden numbers after the final norm, and the layers' keys and values where there is a cache."""
        cfg, x = self.cfg, stream.x
        if cfg.positions == "learned":
            x = x + self.position_embedding(stream.positions)
        context = Context(
            mask=stream.mask,
            rope=rope_tables(stream.positions, cfg) if cfg.positions == "rope" else None,
            memory=stream.memory,
            memory_mask=stream.memory_mask,
            index=cache.index if cache else None,
        )
        x, layers = self.blocks(x, context, cache.layers if cache else None)
        return self.final_norm(x), layers

    def head(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        return self.embedding.attend(x) if self.cfg.tied_head else self.free_head(x)


def empty_layers(cfg: DecoderConfig, fusion: Fusion, rows: int, length: int) -> list:
    """Zeroed keys and values of `length` slots for every self-attention, stacked as `Stack` wants them."""
    blocks = fusion.sublayers(cfg.depth)
    period = repeating_period(blocks)
    shape = (len(blocks) // len(period), rows, length, cfg.num_kv_heads, cfg.head_width)
    return [{"self": (jnp.zeros(shape), jnp.zeros(shape))} for _ in period]
