"""The vision-language model: encoder, projector, fusion, decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.config import CHANNELS, Model, Vision
from vlm_jax.nn.decoder import Decoder, check_length, empty_layers
from vlm_jax.nn.fusion import fuse
from vlm_jax.nn.projector import build_projector
from vlm_jax.nn.vit import ViT
from vlm_jax.structs import Batch, Cache, Output


class VLM(nn.Module):
    """A batch of images and text -> logits of the next token at every position.

    The three children are the sections of `Model`: `vision`, `projector`, `decoder`.
    """

    cfg: Model

    def setup(self):
        self.decoder = Decoder(self.cfg.decoder, self.cfg.fusion)
        if self.cfg.fusion.has_images:
            self.vision = ViT(self.cfg.vision)
            self.projector = build_projector(self.cfg)

    def image_tokens(self, batch: Batch) -> Float[Array, "B T D"]:
        """The I*M projected tokens of each row's images, image after image, view after view."""
        rows, per_row = batch.images.shape[:2]
        images, *tiling = (
            None if x is None else x.reshape(rows * per_row, *x.shape[2:])
            for x in (batch.images, batch.tile_layouts, batch.tile_mask)
        )
        x = self.projector(self.vision(images, *tiling))
        x = axes.constrain(x.reshape(rows, per_row * x.shape[1], x.shape[2]), "B M D")
        return x if batch.image_rows is None else axes.constrain(x[batch.image_rows], "B M D")

    def __call__(self, batch: Batch, cache: Cache | None = None) -> Output:
        """With a cache, `batch` is what follows the tokens in it, and then it needs no images any more."""
        hidden, cache = self.hidden(batch, cache)
        return Output(axes.constrain(self.head(hidden), "B S V"), cache)

    def next_logits(self, batch: Batch, cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of what follows the last slot of every row, and no others."""
        hidden, cache = self.hidden(batch, cache)
        return axes.constrain(self.head(hidden[:, -1:]), "B S V")[:, 0], cache

    def hidden(
        self, batch: Batch, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """What the head reads, and the cache with what was read."""
        looks = self.cfg.fusion.has_images and batch.images is not None
        image = self.image_tokens(batch) if looks else None
        stream = fuse(self.cfg, self.decoder.embed(batch.tokens), image, batch, cache)
        return self.decoder(stream, cache)

    def head(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        return self.decoder.head(hidden)


def empty_cache(cfg: Model, prompt: Batch, new_tokens: int, dtype=jnp.float32) -> Cache:
    """Room for a prompt and the tokens to come, which belong to the segment and branch of the prompt's last token.

    Raises:
      ConfigError: the tokens that will be read, all but the last new one, are more than the positions of the model.
    """

    def continued(ids, step=0):
        coming = ids[:, -1:] + step * jnp.arange(1, new_tokens + 1)
        return jnp.concatenate([ids, coming], axis=1)

    rows, length = prompt.tokens.shape
    check_length(cfg.decoder, length + new_tokens - 1)
    blocks = prompt.block_ids
    return Cache(
        index=jnp.int32(0),
        segment_ids=continued(prompt.segment_ids),
        branch_ids=continued(prompt.branch_ids),
        positions=continued(prompt.positions, step=1),
        block_ids=None if blocks is None else jnp.pad(blocks, ((0, 0), (0, new_tokens))),
        layers=empty_layers(cfg.decoder, cfg.fusion, rows, length + new_tokens, dtype),
    )


def example_batch(cfg: Model, length: int, rows: int = 1) -> Batch:
    """Zeros in the shape of a batch of `rows` rows of `length` tokens with one image each."""
    ids = jnp.zeros((rows, length), jnp.int32)
    text = Batch(
        tokens=ids,
        positions=ids,
        segment_ids=ids + 1,
        branch_ids=ids,
        image_token_index=ids,
        image_mask=jnp.ones((rows, length, cfg.vision.pictures), bool),
        targets=ids,
        loss_weights=jnp.ones((rows, length)),
    )
    return text.replace(**example_images(cfg.vision, rows)) if cfg.fusion.has_images else text


def example_images(cfg: Vision, rows: int) -> dict[str, jax.Array]:
    """The image fields of a batch of `rows` rows with one image each, all zeros."""
    side = cfg.image_size_px
    if not cfg.tile_layouts:
        return {"images": jnp.zeros((rows, cfg.views, side, side, CHANNELS))}
    return {
        "images": jnp.zeros((rows, 1, cfg.tiles, side, side, CHANNELS)),
        "tile_layouts": jnp.zeros((rows, 1), jnp.int32),
        "tile_mask": jnp.ones((rows, 1, cfg.tiles), bool),
    }
