"""Attention of an answer on the object that its question asks about."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.data.builders.boxes import Box, coverage
from vlm_jax.infer.metrics.intervals import Estimate, estimate_mean


class Attention(NamedTuple):
    """Attention of the answer to one question, averaged over its tokens and the heads."""

    layers: tuple[str, ...]
    maps: np.ndarray  # (L, rows, columns): weights on the patches of the image
    box: Box


class Grounding(NamedTuple):
    """Attention on the object of one question. Arrays have a number for each layer."""

    layers: tuple[str, ...]
    mass: np.ndarray  # (L,) share of the attention to the image that is on the object
    #: (L,) share of the patch with the most attention that the object covers
    pointing: np.ndarray
    image: np.ndarray  # (L,) share of the attention that is on the image
    area: float  # share of the image that the object covers


PARTS = ("pointing", "area", "image")
LAYER_NUMBERS = ("mass", "pointing", "image")  # fields of `Grounding` with a number for each layer


def score(attention: Attention) -> Grounding:
    """Compares where an answer looks with where its object is.

    Patches are counted by the share that the object covers. A uniform map, and a random one on
    average, thus has the area of the object as its mass and as its pointing.
    """
    maps = attention.maps
    covered = coverage(attention.box, maps.shape[1:])
    image = maps.sum((1, 2))
    mass = (maps * covered).sum((1, 2)) / np.maximum(image, 1e-30)
    # Several patches share the maximum if they share an image token.
    is_peak = maps == maps.max((1, 2), keepdims=True)
    pointing = (is_peak * covered).sum((1, 2)) / is_peak.sum((1, 2))
    return Grounding(attention.layers, mass, pointing, image, float(covered.mean()))


def summarize(values: Sequence[Grounding]) -> dict[str, Estimate]:
    """Returns the means over the layers and the questions: mass as "", and the PARTS."""
    return {
        "": estimate_mean([float(value.mass.mean()) for value in values]),
        "pointing": estimate_mean([float(value.pointing.mean()) for value in values]),
        "area": estimate_mean([value.area for value in values]),
        "image": estimate_mean([min(float(value.image.mean()), 1.0) for value in values]),
    }


def by_layer(values: Sequence[Grounding]) -> dict[str, dict[str, float]]:
    """Returns layer -> name in LAYER_NUMBERS -> its mean over the questions."""
    means = {name: np.mean([getattr(value, name) for value in values], 0) for name in LAYER_NUMBERS}
    layers = {}
    for i, layer in enumerate(values[0].layers):
        layers[layer] = {name: float(means[name][i]) for name in LAYER_NUMBERS}
    return layers
