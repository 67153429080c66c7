"""What the tests of the unified families share: rows of text and images, and every output that is compared."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch

from tests.hub.parity import assert_round_trip, forward, reference, reloaded, saved
from vlm_jax.hub.inputs import to_batch
from vlm_jax.hub.load import Checkpoint, load_checkpoint
from vlm_jax.infer.generate import SamplingParams, generate
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import NO_IMAGE, Batch

PAD = 0
NEW = 5
TEXT_LENGTHS = (7, 12, 4)  # of the rows
IMAGE_COUNTS = {
    "text only": (0, 0, 0),
    "one image a row": (1, 1, 1),
    "two, none and one": (2, 0, 1),
}


class Pair(NamedTuple):
    """A model of transformers, and ours of a folder that it was saved in."""

    theirs: torch.nn.Module
    checkpoint: Checkpoint
    params: dict

    @classmethod
    def of(cls, theirs: torch.nn.Module, folder: Path) -> "Pair":
        return cls(theirs, *load_checkpoint(folder))

    @property
    def cfg(self):
        return self.checkpoint.cfg

    def batch(self, generating: bool = False, **inputs) -> Batch:
        return to_batch(self.cfg, inputs, self.checkpoint.image_token, generating)

    def logits(self, **inputs) -> np.ndarray:
        return np.asarray(forward(VLM(self.cfg.model), self.params, self.batch(**inputs)).logits)

    def applied(self, batch: Batch, **settings):
        run = jax.jit(
            lambda params, batch: VLM(self.cfg.model).apply({"params": params}, batch, **settings)
        )
        return run(self.params, batch)


def new_pair(theirs: torch.nn.Module, folder: Path) -> Pair:
    """With random parameters."""
    return Pair.of(saved(theirs, folder), folder)


def padded(rows: list[list[int]], side: str) -> dict[str, np.ndarray]:
    """Rows of ids -> `input_ids` and `attention_mask`."""
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), PAD), np.zeros((len(rows), length), int)
    for target, there, row in zip(ids, mask, rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        target[where], there[where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(counts: tuple[int, ...], image: list[int]) -> list[list[int]]:
    """Random texts with the ids `image` in them `counts` times: before the last three tokens, and after the first."""
    rng = np.random.default_rng(0)
    rows = []
    for length, count in zip(TEXT_LENGTHS, counts):
        text = list(rng.integers(1, 50, length))
        for place in (length - 3, 1)[:count]:
            text[place:place] = image
        rows.append(text)
    return rows


def images_of(counts: tuple[int, ...], *shape: int) -> dict[str, np.ndarray]:
    """Random `pixel_values` of all rows, if there are images."""
    count = sum(counts)
    return (
        {"pixel_values": np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)}
        if count
        else {}
    )


def assert_logits_are_equal(pair: Pair, atol: float, **inputs) -> None:
    there = inputs["attention_mask"] == 1
    found, expected = pair.logits(**inputs), reference(pair.theirs, **inputs)
    np.testing.assert_allclose(found[there], expected[there], atol=atol)


def assert_blocks_are_equal(pair: Pair, atol: float, **inputs) -> None:
    """What goes into the decoder's blocks, and what comes out of each: the first that differs names itself."""
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    with torch.no_grad():
        *expected, _ = pair.theirs(
            **tensors, output_hidden_states=True
        ).hidden_states  # the last is after the norm
    states = pair.applied(pair.batch(**inputs), mutable=["intermediates"])[1]["intermediates"][
        "decoder"
    ]
    found = [states["embeddings"][0], *states["blocks"]["layers"]["block_0_out"][0]]
    there = inputs["attention_mask"] == 1
    for i, (ours, theirs) in enumerate(zip(found, expected)):
        name = f"after block {i - 1}" if i else "embeddings"
        np.testing.assert_allclose(
            np.asarray(ours)[there], theirs.numpy()[there], atol=atol, err_msg=name
        )


def assert_image_features_are_equal(
    pair: Pair, features: torch.Tensor, atol: float, **inputs
) -> None:
    """`features` are the projected tokens of all images in reading order, (tokens, D)."""
    batch = pair.batch(**inputs)
    found = np.asarray(pair.applied(batch, method="image_tokens"))
    found = np.concatenate(
        [row[slots[slots != NO_IMAGE]] for row, slots in zip(found, batch.image_token_index)]
    )
    np.testing.assert_allclose(found, features.detach().numpy(), atol=atol)


def assert_greedy_tokens_are_equal(pair: Pair, **inputs) -> None:
    """For left-padded prompts; every row makes NEW tokens, and not all the same."""
    pair.theirs.generation_config.eos_token_id = None
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    made = pair.theirs.generate(**tensors, do_sample=False, max_new_tokens=NEW)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert len(np.unique(made)) > 3, "the answers are all alike: the test would show little"
    batch = pair.batch(generating=True, **inputs)
    np.testing.assert_array_equal(
        generate(pair.cfg.model, pair.params, batch, NEW, SamplingParams()), made
    )


def assert_an_export_is_what_was_loaded(
    pair: Pair, folder: Path, atol: float, inputs: dict, **config
) -> None:
    """In the names of transformers 4.x; it loads there and here with equal logits."""
    assert_round_trip(pair.checkpoint.folder, folder, **config)
    again = Pair.of(reloaded(type(pair.theirs), folder, pair.theirs), folder)
    assert again.cfg == pair.cfg
    np.testing.assert_allclose(
        reference(again.theirs, **inputs), reference(pair.theirs, **inputs), atol=atol
    )
    assert_logits_are_equal(again, atol, **inputs)
