"""Batches of questions that share one shape."""

from collections.abc import Iterable, Sequence

from jax.sharding import Mesh

from vlm_jax import axes
from vlm_jax.data.questions import Question


def batch_indices(count: int, batch_size: int) -> list[list[int]]:
    """Returns the indices of each batch; the last question fills up the last batch."""
    padded = [*range(count), *[count - 1] * (-count % batch_size)]
    return [padded[start : start + batch_size] for start in range(0, len(padded), batch_size)]


def image_rows(image_sources: Iterable[Sequence[Question]], batch_size: int, mesh: Mesh) -> int:
    """Returns the rows of images that the batches of every list need, for all shards of a mesh."""
    most = 0
    for sources in image_sources:
        for indices in batch_indices(len(sources), batch_size):
            most = max(most, len({sources[i].images for i in indices}))
    return axes.round_up_to_shards(most, mesh)
