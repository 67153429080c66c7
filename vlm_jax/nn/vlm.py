"""The vision-language model: encoder, projector, fusion, decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.config import CHANNELS, Model, Vision
from vlm_jax.config.tile_maps import TAPS, has_maps_in_memory, map_memory_length
from vlm_jax.nn.decoder import Decoder, check_length, empty_layers
from vlm_jax.nn.fusion import fuse
from vlm_jax.nn.projector import build_projector
from vlm_jax.nn.vit import ViT
from vlm_jax.structs import Batch, Cache, DecoderInputs, MapMemory, Output


class VLM(nn.Module):
    """Maps a batch of images and text to logits of the next token at every position.

    The three children are the sections of `Model`: `vision`, `projector`, `decoder`.
    """

    cfg: Model

    def setup(self):
        self.decoder = Decoder(self.cfg.decoder, self.cfg.fusion)
        if self.cfg.fusion.has_images:
            self.vision = ViT(self.cfg.vision)
            self.projector = build_projector(self.cfg)

    def __call__(self, batch: Batch, cache: Cache | None = None) -> Output:
        """Returns logits (B, S, V) and the updated KV cache.

        With a cache, `batch` continues the cached tokens and needs no images.
        """
        hidden, cache = self.hidden(batch, cache)
        return Output(axes.constrain(self.head(hidden), "B S V"), cache)

    def next_logits(self, batch: Batch, cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Returns logits of the token after the last slot of every row, and the updated cache."""
        hidden, cache = self.hidden(batch, cache)
        return axes.constrain(self.head(hidden[:, -1:]), "B S V")[:, 0], cache

    def hidden(
        self,
        batch: Batch,
        cache: Cache | None = None,
        image_tokens: Float[Array, "B T E"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Returns the final hidden states (B, S, D) and the updated KV cache.

        Args:
          image_tokens: of `image_tokens`, if they were computed before, instead of `batch.images`.
        """
        return self.decoder(self.decoder_inputs(batch, cache, image_tokens), cache)

    def decoder_inputs(
        self,
        batch: Batch,
        cache: Cache | None = None,
        image_tokens: Float[Array, "B T E"] | None = None,
    ) -> DecoderInputs:
        """Returns the embedded text together with the image tokens; arguments as of `hidden`."""
        # While decoding, the image tokens are in the cache already.
        if self.cfg.fusion.has_images and batch.images is not None:
            image_tokens = self.image_tokens(batch)
        text_tokens = self.decoder.embed(batch.tokens)
        has_maps = self.cfg.vision.tile_grids and self.cfg.fusion.has_images
        newline = self.projector.newline if has_maps else None
        return fuse(self.cfg, text_tokens, image_tokens, batch, cache, newline)

    def image_tokens(self, batch: Batch) -> Float[Array, "B T E"]:
        """Returns the projected tokens of each row: image after image, view after view."""
        encode = self._packed_tokens if self.cfg.vision.is_native else self._tokens_by_image
        x = axes.constrain(encode(batch), "B M D")
        if batch.image_rows is None:
            return x
        return axes.constrain(x[batch.image_rows], "B M D")

    def _tokens_by_image(self, batch: Batch):
        def by_image(x):
            return None if x is None else x.reshape(-1, *x.shape[2:])

        x = self.vision(
            by_image(batch.images), by_image(batch.tile_layouts), by_image(batch.tile_mask)
        )
        x = self.projector(x)
        rows, images = batch.images.shape[:2]
        return x.reshape(rows, images * x.shape[1], x.shape[2])

    def _packed_tokens(self, batch: Batch):
        x = self.vision(
            batch.images, patch_images=batch.patch_images, patch_places=batch.patch_places
        )
        if self.cfg.has_tokens_by_size:
            return self.projector(x)
        return self.projector(x, batch.patch_images, batch.image_mask.shape[-1])

    def head(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        return self.decoder.head(hidden)


def empty_cache(cfg: Model, prompt: Batch, new_tokens: int, dtype=jnp.float32) -> Cache:
    """Returns an empty KV cache for a prompt and `new_tokens` more tokens.

    The new tokens belong to the segment and the branch of the prompt's last token.

    Raises:
      ConfigError: the model has fewer positions than input tokens (all but the last new token).
    """

    def extend(ids, step=0):
        if ids is None:
            return None
        new_ids = ids[:, -1:] + step * jnp.arange(1, new_tokens + 1)
        return jnp.concatenate([ids, new_ids], axis=1)

    rows, length = prompt.tokens.shape
    check_length(cfg.decoder, length + new_tokens - 1)
    blocks = prompt.block_ids
    return Cache(
        index=jnp.int32(0),
        segment_ids=extend(prompt.segment_ids),
        branch_ids=extend(prompt.branch_ids),
        positions=extend(prompt.positions, step=1),
        block_ids=None if blocks is None else jnp.pad(blocks, ((0, 0), (0, new_tokens))),
        layers=empty_layers(cfg.decoder, cfg.fusion, rows, length + new_tokens, dtype),
    )


def example_batch(
    cfg: Model, length: int, rows: int = 1, images: int = 1, patches: int | None = None
) -> Batch:
    """Zeros in the shape of a batch of `rows` rows of `length` tokens with `images` images each.

    Args:
      patches: P, patches of a row at native resolution; None: of images with the most patches.
    """
    ids = jnp.zeros((rows, length), jnp.int32)
    text = Batch(
        tokens=ids,
        positions=ids,
        segment_ids=ids + 1,
        image_token_index=ids,
        image_mask=jnp.ones((rows, length, images * cfg.vision.pictures), bool),
        targets=ids,
        loss_weights=jnp.ones((rows, length)),
    )
    if not cfg.fusion.has_images:
        return text
    batch = text.replace(**example_images(cfg.vision, rows, images, patches))
    if not has_maps_in_memory(cfg.vision, cfg.fusion):
        return batch
    keys = images * map_memory_length(cfg.vision, cfg.projector, cfg.fusion)
    index = jnp.zeros((rows, keys), jnp.int32)
    memory = MapMemory(index, views=index)
    if cfg.vision.max_map_tiles is not None:
        taps = jnp.zeros((rows, keys, TAPS), jnp.int32)
        memory = memory.replace(taps=taps, weights=taps.astype(jnp.float32))
    return batch.replace(map_memory=memory)


def example_images(
    cfg: Vision, rows: int, images: int = 1, patches: int | None = None
) -> dict[str, jax.Array]:
    """The image fields of `example_batch`, all zeros."""
    side = cfg.image_size_px
    if cfg.is_native:
        count = images * cfg.most_patches if patches is None else patches
        ids = jnp.ones((rows, count), jnp.int32)
        return {
            "images": jnp.zeros((rows, count, cfg.patch_dim)),
            "patch_images": ids,
            "patch_places": jnp.zeros((rows, count, 2), jnp.int32),
        }
    if not cfg.tile_layouts:
        return {"images": jnp.zeros((rows, images * cfg.views, side, side, CHANNELS))}
    return {
        "images": jnp.zeros((rows, images, cfg.tiles, side, side, CHANNELS)),
        "tile_layouts": jnp.zeros((rows, images), jnp.int32),
        "tile_mask": jnp.ones((rows, images, cfg.tiles), bool),
    }
