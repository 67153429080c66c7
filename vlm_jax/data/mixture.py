"""Mixtures: the examples of the sources of `data.mixture` in one endless stream.

Every source is shuffled by itself, anew in every epoch of its own. Which source example k of the
stream is of depends on k and the shares alone (Grain's `MapDataset.mix`), so that the stream is a
function of the seed. Without a mixture there is one source, without a name.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from vlm_jax.config import Experiment, naming_source
from vlm_jax.data.fields import Fields


class Part(NamedTuple):
    """The examples of a source."""

    name: str  # "" without a mixture
    number: int  # in `data.mixture`
    cfg: Experiment  # the experiment with the data of this source alone
    examples: Sequence[Any]

    def shuffled(self, items: Sequence | None = None) -> grain.MapDataset:
        """Returns the examples, or an item for each, in the order of the first epoch."""
        items = self.examples if items is None else items
        # Another seed for each name, so that a further source changes nothing of the others.
        seed = self.cfg.seed ^ zlib.crc32(self.name.encode())
        return grain.MapDataset.source(items).seed(seed).shuffle()

    def label(self, example_id: Any) -> Any:
        """Returns the id of an example, with the name of its source if there is a mixture."""
        return f"{self.name}/{example_id}" if self.name else example_id

    def tagged(self, fields: Fields) -> Fields:
        """Adds the number of the source to every token, if there is a mixture."""
        if not self.name:
            return fields
        return fields | {"source_ids": np.full(len(fields["tokens"]), self.number, np.int32)}


def read_parts(cfg: Experiment, read: Callable[[Experiment], Sequence[Any]]) -> list[Part]:
    """Reads the examples of every source; an error names it."""
    parts = []
    for number, (name, part) in enumerate(cfg.parts.items()):
        with naming_source(name):
            parts.append(Part(name, number, part, read(part)))
    return parts


def mix(cfg: Experiment, epochs: Sequence[grain.MapDataset]) -> grain.MapDataset:
    """Returns the endless mixture of datasets, one epoch of each source."""
    endless = [epoch.repeat() for epoch in epochs]
    if not cfg.data.mixture:
        return endless[0]
    return grain.MapDataset.mix(endless, cfg.data.mixture_shares([len(epoch) for epoch in epochs]))
