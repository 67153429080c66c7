"""Maps of attention over the patches of images, for every token of an answer.

    attention weights -> image tokens -> patches of each view
    (queries, keys)      (I, M)          (I, rows, columns)

A patch stands for its token of the encoder, which has mixed the patches before: the maps show where
a decoder reads, and not what an encoder put there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import einops
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from vlm_jax.config import ConfigError, Model
from vlm_jax.infer.look import METHODS
from vlm_jax.infer.look.observe import ATTENTIONS, Observed, gradient_relevance, observe
from vlm_jax.nn.positions import continued_rope_positions
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import NO_IMAGE, PADDING, Batch

SLOTS = 4  # the number of tokens that are looked at together is a multiple of it


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of A tokens over the patches of the I views of a row's images.

    A view is an image, one of its tiles, or its thumbnail. `weights` are those of the query that
    predicts the token; their sum over views and patches is the share of the attention that is on
    image tokens: 1 in cross-attention, at most 1 in self-attention. At native resolution an image
    fills the upper left of the rows and columns of the largest.
    """

    tokens: np.ndarray  # (A,) int32
    layers: tuple[str, ...]  # L names, such as "cross 0": the sublayer and its block
    weights: np.ndarray  # (A, L, N, I, rows, columns)
    #: (A, I, rows, columns): attention rollout (Abnar and Zuidema 2020); None: not asked for
    rollout: np.ndarray | None = None
    #: (A, I, rows, columns): gradient-weighted relevance (Chefer et al. 2021); None: not asked for
    gradient: np.ndarray | None = None

    def combine(self, method: str) -> np.ndarray:
        """Returns one map for each token, (A, I, rows, columns), by a row of METHODS.

        Raises:
          ConfigError: the method does not exist, or `look` was not asked for it.
        """
        check_method(method)
        if method == "mean":
            return self.weights.mean((1, 2))
        if method == "max":
            return self.weights.max((1, 2))
        combined = getattr(self, method)
        if combined is None:
            raise ConfigError(f"the maps have no {method}: call look with {method}=True.")
        return combined


def check_method(method: str, where: str = "method") -> None:
    """Raises ConfigError if a method of combining layers and heads does not exist."""
    if method not in METHODS:
        raise ConfigError(f"{where} {method!r} does not exist: choose {', '.join(METHODS)}.")


def look(
    model: nn.Module, params, batch: Batch, rollout: bool = False, gradient: bool = False
) -> list[AttentionMaps]:
    """Implements `vlm_jax.look`."""
    cfg = _check(model, batch)
    slots = [np.flatnonzero(row > 0) for row in np.asarray(batch.loss_weights)]
    if not max(map(len, slots)):
        raise ConfigError("the batch scores no token: there is no answer to look at.")
    # Rows with fewer tokens repeat some, and few lengths mean few compiled programs.
    most = -(-max(map(len, slots)) // SLOTS) * SLOTS
    padded = np.stack([np.resize(row, most) if len(row) else np.zeros(most, int) for row in slots])
    targets = np.take_along_axis(np.asarray(batch.targets), padded, axis=1)
    inputs = batch.replace(targets=None, loss_weights=None)
    observed = _gather(observe(cfg, params, inputs, padded, rollout))
    relevance = None
    if gradient:
        by_token = []
        for token in range(max(map(len, slots))):
            relevant = gradient_relevance(cfg, params, inputs, padded[:, token], targets[:, token])
            by_token.append(_gather(relevant))
        relevance = np.stack(by_token, axis=1)  # (B, A, S + T)
    maps = []
    for row, row_slots in enumerate(slots):
        count = len(row_slots)
        patches = _RowPatches(cfg, batch, row, observed.resampler)
        maps.append(
            AttentionMaps(
                tokens=targets[row, :count],
                layers=layer_names(cfg),
                weights=patches.by_layer(observed)[:count],
                rollout=patches.of_all_tokens(observed.rollout)[:count] if rollout else None,
                gradient=patches.of_all_tokens(relevance)[:count] if gradient else None,
            )
        )
    return maps


def _gather(arrays):
    """Returns arrays of all devices and processes as NumPy arrays."""
    return multihost_utils.process_allgather(arrays, tiled=True)


def _check(model: nn.Module, batch: Batch) -> Model:
    if not isinstance(model, VLM):
        raise ConfigError("the model is an encoder: it writes no answer whose attention has maps.")
    check_maps(model.cfg)
    if batch.images is None:
        raise ConfigError("the batch has no image: there is nothing to look at.")
    if batch.images.ndim < 5 and not model.cfg.vision.is_native:
        raise ConfigError("images that are already cut into patches (Fuyu) have no attention maps.")
    if batch.loss_weights is None:
        raise ConfigError(
            "the batch has no answers: make it with processor(prompts, images, answers=answers)."
        )
    return model.cfg


def check_maps(cfg: Model) -> None:
    """Raises ConfigError if the model reads no images."""
    if not cfg.fusion.has_images:
        raise ConfigError(f"fusion.kind {cfg.fusion.kind} reads no image, so it has no maps.")


def image_sublayers(cfg: Model) -> tuple[str, ...]:
    """Returns the kinds of attention that read image tokens."""
    reads = {"self": cfg.fusion.image_in_sequence, "cross": cfg.fusion.image_in_memory}
    return tuple(name for name in ATTENTIONS if reads[name])


def layer_names(cfg: Model) -> tuple[str, ...]:
    """Returns the attention sublayers that read image tokens, in the order in which they run."""
    names = []
    for block, sublayers in enumerate(cfg.fusion.sublayers(cfg.decoder.depth)):
        names += [f"{name} {block}" for name in sublayers if name in image_sublayers(cfg)]
    return tuple(names)


@dataclass(frozen=True)
class _RowPatches:
    """Turns weights of a row's keys into weights of the patches of its views."""

    cfg: Model
    batch: Batch
    row: int
    resampler: np.ndarray | None  # of `Observed`

    def by_layer(self, observed: Observed) -> np.ndarray:
        """Returns the weights of all layers, (A, L, N, I, rows, columns)."""
        by_name = {}
        for name in image_sublayers(self.cfg):
            weights = np.moveaxis(getattr(observed, name)[:, self.row], 2, 1)  # (L, A, N, keys)
            by_name[name] = iter(self._place(name, weights))
        layers = [next(by_name[layer.split()[0]]) for layer in layer_names(self.cfg)]
        return self._to_patches(np.stack(layers, axis=1))

    def of_all_tokens(self, shares: np.ndarray) -> np.ndarray:
        """Returns shares (B, A, S + T) of the row as (A, I, rows, columns)."""
        of_sequence, of_memory = np.split(shares[self.row], [self._index.size], axis=-1)
        placed = 0.0
        if "self" in image_sublayers(self.cfg):
            placed = placed + self._place("self", of_sequence)
        if "cross" in image_sublayers(self.cfg):
            placed = placed + self._place("cross", of_memory)
        return self._to_patches(placed)

    @property
    def _index(self) -> np.ndarray:
        return np.asarray(self.batch.image_token_index)[self.row]  # (S,)

    def _place(self, name: str, weights: np.ndarray) -> np.ndarray:
        """Weights of keys -> weights of image tokens, (..., I, M).

        At native resolution (..., T), the tokens of all images of the row.
        """
        cfg, lead = self.cfg, weights.shape[:-1]
        views, size = self.batch.image_mask.shape[-1], cfg.image_tokens
        shape, maps = (views, size), self.batch.map_memory
        if cfg.has_tokens_by_size:
            shape = (self.batch.images.shape[1] // cfg.vision.patch_square**2,)
        if name == "self" or maps is not None:
            index = self._index if name == "self" else np.asarray(maps.index)[self._image_row]
            placed = np.zeros((*lead, math.prod(shape)), weights.dtype)
            is_placed = index >= 0
            # Tokens of a resized map may have a nearest image token in common.
            np.add.at(placed, (..., index[is_placed]), weights[..., is_placed])
        elif cfg.fusion.splits_views and not cfg.vision.is_native:
            vision = cfg.vision
            placed = np.zeros((*lead, views // vision.views, vision.views, size), weights.dtype)
            tiles = weights.reshape(*lead, -1, vision.cut_tiles, size)
            placed[..., : vision.cut_tiles, :] = tiles
        else:
            placed = weights
        return placed.reshape(*lead, *shape)

    def _to_patches(self, weights: np.ndarray) -> np.ndarray:
        """Weights of image tokens (..., I, M) -> weights of patches (..., I, rows, columns).

        The weight of a token of several patches is divided among them: equally, or as the resampler
        reads them. A class token belongs to no patch.
        """
        cfg = self.cfg
        if cfg.vision.is_native:
            return self._unpack(self._to_packed_patches(weights))
        rows, columns = cfg.vision.grid
        match cfg.projector.spec.tokens:
            case "queries":
                weights = np.einsum("...iq,iqp->...ip", weights, self._resampler_of_row)
            case "squares":
                f = cfg.projector.factor
                weights = einops.repeat(
                    weights / f**2, "... (h w) -> ... (h f w g)", w=columns // f, f=f, g=f
                )
            case "all":
                weights = weights[..., cfg.vision.extra_tokens :]
        return weights.reshape(*weights.shape[:-1], rows, columns)

    def _to_packed_patches(self, weights: np.ndarray) -> np.ndarray:
        """Weights of image tokens -> weights of the packed patches of all images, (..., P)."""
        if self.cfg.has_tokens_by_size:
            square = self.cfg.vision.patch_square**2
            return np.repeat(weights / square, square, axis=-1)
        return weights.reshape(*weights.shape[:-2], -1) @ self.resampler[self._image_row]

    def _unpack(self, weights: np.ndarray) -> np.ndarray:
        """Weights of packed patches (..., P) -> (..., I, rows, columns) of the largest image."""
        images = np.asarray(self.batch.patch_images)[self._image_row]  # (P,)
        places = np.asarray(self.batch.patch_places)[self._image_row]  # (P, 2)
        is_patch = images != PADDING
        shape = self.batch.image_mask.shape[-1], *places.max(axis=0) + 1
        maps = np.zeros((*weights.shape[:-1], *shape), weights.dtype)
        maps[(..., images[is_patch] - 1, *places[is_patch].T)] = weights[..., is_patch]
        return maps

    @property
    def _image_row(self) -> int:
        rows = self.batch.image_rows
        return self.row if rows is None else int(rows[self.row])

    @property
    def _resampler_of_row(self) -> np.ndarray:
        by_row = self.resampler.reshape(len(self.batch.images), -1, *self.resampler.shape[1:])
        return by_row[self._image_row]


def append_answer(batch: Batch, ids: Sequence[int]) -> Batch:
    """Appends generated tokens to a prompt, (1, S) -> (1, S + A - 1), as the scored targets.

    The fields of a new token are those that decoding gives it (`infer.generate.decode_step`).
    """
    tokens = np.concatenate([batch.tokens, np.asarray(ids, np.int32)[None]], axis=1)
    length, added = batch.tokens.shape[1], len(ids) - 1

    def repeat_last(x):
        return np.concatenate([x, np.repeat(np.asarray(x)[:, -1:], added, axis=1)], axis=1)

    def fill(x, value):
        return np.pad(x, ((0, 0), (0, added)), constant_values=value)

    new_positions = batch.positions[:, -1:] + np.arange(1, added + 1, dtype=np.int32)
    optional = {}
    if batch.branch_ids is not None:
        optional["branch_ids"] = repeat_last(batch.branch_ids)
    if batch.no_image_mask is not None:
        optional["no_image_mask"] = repeat_last(batch.no_image_mask)
    if batch.block_ids is not None:
        optional["block_ids"] = fill(batch.block_ids, 0)
    if batch.rope_positions is not None:
        last, steps = batch.rope_positions[:, -1:], np.arange(1, added + 1, dtype=np.int32)
        new_rope_positions = continued_rope_positions(np.repeat(last, added, axis=1), steps)
        optional["rope_positions"] = np.concatenate([batch.rope_positions, new_rope_positions], 1)
    if batch.image_taps is not None:
        optional["image_taps"] = repeat_last(batch.image_taps)
        optional["tap_weights"] = repeat_last(batch.tap_weights)
    is_scored = np.arange(length + added) >= length - 1
    return batch.replace(
        tokens=tokens[:, :-1],
        positions=np.concatenate([batch.positions, new_positions], axis=1),
        segment_ids=repeat_last(batch.segment_ids),
        image_token_index=fill(batch.image_token_index, NO_IMAGE),
        image_mask=repeat_last(batch.image_mask),
        targets=tokens[:, 1:],
        loss_weights=is_scored[None].astype(np.float32),
        **optional,
    )
