"""Examples of a training split before packing, encoded as in training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from vlm_jax.config import Experiment
from vlm_jax.data import packing, pipeline
from vlm_jax.data.mixture import Part
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.structs import PADDING, TRUNK


@dataclass(frozen=True)
class Example:
    """A conversation cut to its row, or a row of questions about one image; N tokens."""

    id: str | int
    tokens: np.ndarray  # (N,)
    is_scored: np.ndarray  # (N,) bool
    images: list[Any]  # indices of images of the dataset, or the id of the image
    segments: np.ndarray  # (N,): 1; of a row of questions their numbers, 0 for the image
    turns: int
    source: str = ""  # of the mixture

    def as_json(self) -> dict[str, Any]:
        """Returns the fields that `data --json` prints."""
        source = {"source": self.source} if self.source else {}
        return {
            **source,
            "id": self.id,
            "tokens": self.tokens.tolist(),
            "scored": self.is_scored.astype(int).tolist(),
            "images": self.images,
            "segments": self.segments.tolist(),
        }


def read(cfg: Experiment, tokenizer: Tokenizer, limit: int | None = None) -> Iterator[Example]:
    """Yields the first `limit` examples of `data.train_split` (None: all) and shows the progress.

    Conversations are in the order of the files; questions are packed as in the first epoch. The
    sources of a mixture follow each other.

    Raises:
      ConfigError: the data cannot be used for training.
    """
    if cfg.data.is_conversations:
        parts = pipeline.conversation_parts(cfg, tokenizer)
        readers = [_Conversations(tokenizer, part) for part in parts]
    else:
        readers = [_Questions(tokenizer, part) for part in pipeline.record_parts(cfg)]
    places = [(reader, index) for reader in readers for index in range(len(reader))][:limit]
    for reader, index in tqdm(places, desc="reading examples", unit="example", disable=None):
        yield reader[index]


def shift_scores(loss_weights: np.ndarray) -> np.ndarray:
    """Returns whether each token is scored, from the weights of the tokens that predict it.

    Args:
      loss_weights: (..., S).
    """
    is_scored = np.zeros_like(loss_weights, bool)
    is_scored[..., 1:] = loss_weights[..., :-1] > 0
    return is_scored


class _Conversations:
    def __init__(self, tokenizer: Tokenizer, part: Part):
        self._tokenizer = tokenizer
        self._part = part
        self._count_tiles = packing.tile_counter(part.cfg, part.examples)

    def __len__(self) -> int:
        return len(self._part.examples)

    def __getitem__(self, index: int) -> Example:
        conversation = self._part.examples[index]
        fields = packing.encode_for_packing(
            self._part.cfg, self._tokenizer, self._count_tiles, conversation
        )
        return Example(
            id=conversation.id,
            tokens=fields["tokens"],
            is_scored=shift_scores(fields["loss_weights"]),
            images=fields["images"].tolist(),
            segments=np.ones_like(fields["tokens"]),
            turns=len(conversation.turns),
            source=self._part.name,
        )


class _Questions:
    def __init__(self, tokenizer: Tokenizer, part: Part):
        self._part = part
        self._records = part.shuffled()
        self._rows = pipeline.record_rows(tokenizer, part)
        self._has_images = part.cfg.fusion.has_images

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        image_id = self._records[index].image_id
        is_token = row["segment_ids"] != PADDING
        branches = row["branch_ids"][is_token]
        return Example(
            id=image_id,
            tokens=row["tokens"][is_token],
            is_scored=shift_scores(row["loss_weights"])[is_token],
            images=[image_id] if self._has_images else [],
            segments=branches,
            # A question and its answer.
            turns=2 * int(branches.max(initial=TRUNK)),
            source=self._part.name,
        )
