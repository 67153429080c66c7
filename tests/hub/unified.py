"""Parity laws of decoders and unified vision-language models; a family's test adds its configs.

All laws of a model use one shape, and its logits, hidden states and image tokens come from one
compiled program.
"""

import functools
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tests.hub.parity import assert_round_trip, forward, reference, reloaded, saved
from vlm_jax.hub.image_inputs import IMAGE_MASKS
from vlm_jax.hub.inputs import to_batch
from vlm_jax.hub.load import Checkpoint, load_checkpoint
from vlm_jax.infer.generate import SamplingParams, generate
from vlm_jax.nn.vlm import VLM
from vlm_jax.structs import NO_IMAGE, Batch

PAD = 0
NEW = 5
TEXT_LENGTHS = (7, 12, 4)
MIXED = "two, none and one"
IMAGE_COUNTS = {"text only": (0, 0, 0), "one image a row": (1, 1, 1), MIXED: (2, 0, 1)}


def is_image_tokens(_, method: str) -> bool:
    """Filter of `capture_intermediates`: keeps the projected image tokens."""
    return method == "image_tokens"


class Pair(NamedTuple):
    """A model of transformers and ours, loaded from the folder that it was saved in."""

    hf: PreTrainedModel
    checkpoint: Checkpoint
    params: dict

    @classmethod
    def load(cls, hf: PreTrainedModel, folder: Path) -> "Pair":
        return cls(hf, *load_checkpoint(folder))

    @property
    def cfg(self):
        return self.checkpoint.cfg

    def batch(self, generating: bool = False, **inputs) -> Batch:
        counts = generating or self.checkpoint.family.counts_positions
        return to_batch(self.cfg, inputs, self.checkpoint.image_token, counts)

    def outputs(self, batch: Batch) -> tuple[np.ndarray, dict]:
        """Returns logits and intermediates (hidden states of all blocks, image tokens)."""
        settings = {"mutable": "intermediates", "capture_intermediates": is_image_tokens}
        output, state = forward(VLM(self.cfg.model), self.params, batch, **settings)
        # NumPy's: operations of JAX outside of a program are compiled one by one.
        return np.asarray(output.logits), jax.device_get(state["intermediates"])

    def logits(self, **inputs) -> np.ndarray:
        return self.outputs(self.batch(**inputs))[0]

    def intermediates(self, **inputs) -> dict:
        return self.outputs(self.batch(**inputs))[1]

    def generate(self, **inputs) -> np.ndarray:
        """Greedy tokens (B, NEW), decoded with the KV cache."""
        batch = self.batch(generating=True, **inputs)
        return np.asarray(generate(self.cfg.model, self.params, batch, NEW, SamplingParams()))


def new_pair(hf: PreTrainedModel, folder: Path) -> Pair:
    """A pair with random parameters."""
    return Pair.load(saved(hf, folder), folder)


def padded(rows: list[list[int]], side: str, length: int | None = None) -> dict[str, np.ndarray]:
    """Pads rows of ids to `length` (None: the longest); returns ids and attention mask."""
    length = length or max(map(len, rows))
    ids = np.full((len(rows), length), PAD)
    mask = np.zeros((len(rows), length), int)
    for row_ids, row_mask, row in zip(ids, mask, rows):
        tokens = slice(length - len(row), None) if side == "left" else slice(len(row))
        row_ids[tokens], row_mask[tokens] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def random_rows(counts: tuple[int, ...], image: list[int]) -> list[list[int]]:
    """Random texts with images, the ids `image`: before the last three tokens, after the first."""
    rng = np.random.default_rng(0)
    rows = []
    for length, count in zip(TEXT_LENGTHS, counts):
        text = list(rng.integers(1, 50, length))
        for position in (length - 3, 1)[:count]:
            text[position:position] = image
        rows.append(text)
    return rows


def random_images(counts: tuple[int, ...], *shape: int) -> dict[str, np.ndarray]:
    """Random `pixel_values` of all rows; no argument at all without images."""
    count = sum(counts)
    if not count:
        return {}
    pixels = np.random.default_rng(1).normal(size=(count, *shape))
    return {"pixel_values": pixels.astype(np.float32)}


def assert_logits_are_equal(pair: Pair, atol: float, **inputs) -> None:
    is_token = inputs["attention_mask"] == 1
    expected = reference(pair.hf, **inputs)
    np.testing.assert_allclose(pair.logits(**inputs)[is_token], expected[is_token], atol=atol)


def assert_blocks_are_equal(pair: Pair, atol: float, **inputs) -> None:
    """Compares the input of the blocks and the output of each; the error names the first."""
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    with torch.no_grad():
        outputs = pair.hf(**tensors, output_hidden_states=True)
        # BLIP-2's are of its language model.
        outputs = getattr(outputs, "language_model_outputs", outputs)
        # The last hidden state of transformers is after the final norm.
        *expected, _ = outputs.hidden_states
    decoder = pair.intermediates(**inputs)["decoder"]
    states = [decoder["embeddings"][0], *decoder["blocks"]["layers"]["block_0_out"][0]]
    is_token = inputs["attention_mask"] == 1
    for i, (state, hf_state) in enumerate(zip(states, expected)):
        np.testing.assert_allclose(
            np.asarray(state)[is_token],
            hf_state.numpy()[is_token],
            atol=atol,
            err_msg=f"after block {i - 1}" if i else "embeddings",
        )


def assert_image_features_are_equal(
    pair: Pair, features: torch.Tensor, atol: float, **inputs
) -> None:
    """Compares with `features`, the projected tokens of all images in order, (tokens, D)."""
    batch = pair.batch(**inputs)
    image_tokens = np.asarray(pair.outputs(batch)[1]["image_tokens"][0])
    in_order = [
        row[index[index != NO_IMAGE]] for row, index in zip(image_tokens, batch.image_token_index)
    ]
    np.testing.assert_allclose(np.concatenate(in_order), features.detach().numpy(), atol=atol)


def hf_greedy(pair: Pair, **inputs) -> np.ndarray:
    """Prompts and the NEW tokens that transformers generates from them, (B, S + NEW)."""
    pair.hf.generation_config.eos_token_id = None
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    sequences = pair.hf.generate(**tensors, do_sample=False, max_new_tokens=NEW).numpy()
    assert len(np.unique(sequences[:, -NEW:])) > 3, "equal answers would prove little"
    return sequences


def continued(
    pair: Pair, inputs: dict[str, np.ndarray], sequences: np.ndarray
) -> dict[str, np.ndarray]:
    """Extends the inputs of left-padded prompts to `sequences`, prompts and NEW answer tokens."""
    # Of an answer's tokens: after PaliGemma's prefix they have type 1, which Gemma 3's images have.
    values = {"attention_mask": 1, "decoder_attention_mask": 1, "mm_token_type_ids": 0}
    values["token_type_ids"] = int(pair.cfg.fusion.is_prefix_lm)
    arrays = dict(inputs)
    for name, x in inputs.items():
        if name in values:
            arrays[name] = np.pad(x, ((0, 0), (0, NEW)), constant_values=values[name])
        elif name in IMAGE_MASKS:
            # Answers attend to the images of the last prompt token.
            arrays[name] = np.concatenate([x, np.repeat(x[:, -1:], NEW, axis=1)], axis=1)
        elif name.endswith("input_ids"):
            arrays[name] = sequences
    return arrays


def assert_greedy_tokens_are_equal(pair: Pair, **inputs) -> None:
    """Teacher forcing: every token that transformers generates is our most likely one."""
    sequences = hf_greedy(pair, **inputs)
    logits = pair.logits(generating=True, **continued(pair, inputs, sequences))
    np.testing.assert_array_equal(logits[:, -NEW - 1 : -1].argmax(-1), sequences[:, -NEW:])


def assert_cached_greedy_tokens_are_equal(pair: Pair, **inputs) -> None:
    """Our own decoding with the KV cache generates the tokens of transformers."""
    np.testing.assert_array_equal(pair.generate(**inputs), hf_greedy(pair, **inputs)[:, -NEW:])


def assert_an_export_is_what_was_loaded(
    pair: Pair, folder: Path, atol: float, inputs: dict, **config
) -> None:
    """Exports with the names of transformers 4.x; loads there and here with equal logits."""
    assert_round_trip(pair.checkpoint.folder, folder, **config)
    again = Pair.load(reloaded(type(pair.hf), folder, pair.hf), folder)
    assert again.cfg == pair.cfg
    np.testing.assert_allclose(
        reference(again.hf, **inputs), reference(pair.hf, **inputs), atol=atol
    )
    assert_logits_are_equal(again, atol, **inputs)


class DecoderLaws:
    """Laws of a family of decoders; a subclass gives its models: class and config by kind."""

    MODELS: ClassVar[dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]]]
    CACHED: ClassVar[tuple[str, ...]]  # kinds that are decoded with our KV cache as well
    SEED: ClassVar[int] = 0  # of the texts
    LENGTHS: ClassVar[tuple[int, ...]] = (7, 12)
    ATOL: ClassVar[float] = 1e-4

    def pytest_generate_tests(self, metafunc) -> None:
        if "kind" in metafunc.fixturenames:
            is_cached = metafunc.function.__name__.startswith("test_cached_greedy")
            kinds = self.CACHED if is_cached else self.MODELS
            metafunc.parametrize("kind", kinds, scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def pairs(cls, tmp_path_factory):
        """`pairs(kind)`: one model for all laws."""

        @functools.cache
        def load(kind):
            model, config = cls.MODELS[kind]
            torch.manual_seed(0)
            return new_pair(model(config), tmp_path_factory.mktemp("hub"))

        return load

    @pytest.fixture
    def pair(self, kind, pairs) -> Pair:
        return pairs(kind)

    def config_keys(self, pair: Pair) -> dict:
        """Keys of config.json that only transformers reads."""
        return {}

    def prompts(self, pair: Pair) -> dict[str, np.ndarray]:
        """Left-padded prompts."""
        return self.inputs(pair, "left", 0)

    def inputs(self, pair: Pair, side: str, room: int = NEW) -> dict[str, np.ndarray]:
        """Texts with `room` more slots than the longest; NEW: the shape of prompts and answers."""
        rng = np.random.default_rng(self.SEED)
        rows = [rng.integers(1, 64, length).tolist() for length in self.LENGTHS]
        return padded(rows, side, max(self.LENGTHS) + room)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_logits_are_those_of_transformers(self, pair, side):
        assert_logits_are_equal(pair, self.ATOL, **self.inputs(pair, side))

    def test_blocks_are_those_of_transformers_in_order(self, pair):
        assert_blocks_are_equal(pair, self.ATOL, **self.inputs(pair, "right"))

    def test_greedy_tokens_are_those_of_transformers(self, pair):
        assert_greedy_tokens_are_equal(pair, **self.prompts(pair))

    def test_cached_greedy_tokens_are_those_of_transformers(self, pair):
        assert_cached_greedy_tokens_are_equal(pair, **self.prompts(pair))

    def test_an_export_is_what_was_loaded_and_transformers_loads_it(self, pair, tmp_path):
        inputs = self.inputs(pair, "right")
        keys = self.config_keys(pair)
        assert_an_export_is_what_was_loaded(pair, tmp_path, self.ATOL, inputs, **keys)


class UnifiedLaws(DecoderLaws):
    """Laws of a family whose image tokens are in the decoder's sequence."""

    FEATURES_ATOL: ClassVar[float] = 1e-4

    def pytest_generate_tests(self, metafunc) -> None:
        """Every batch of `IMAGE_COUNTS` for the first model, the mixed one for the others."""
        if "counts" not in metafunc.fixturenames:
            super().pytest_generate_tests(metafunc)
            return
        first, *others = self.MODELS
        cases = [(first, counts) for counts in IMAGE_COUNTS] + [(kind, MIXED) for kind in others]
        metafunc.parametrize("kind, counts", cases, scope="class")

    def image_ids(self, pair: Pair) -> list[int]:
        """Ids of one image in the text."""
        return [pair.checkpoint.image_token] * pair.cfg.image_tokens

    def pixels(self, counts: tuple[int, ...]) -> dict[str, np.ndarray]:
        return random_images(counts, 3, 16, 16)

    def image_features(self, pair: Pair, inputs: dict) -> torch.Tensor:
        """Projected image tokens of transformers, (tokens, D)."""
        features = pair.hf.get_image_features(torch.tensor(inputs["pixel_values"])).pooler_output
        return torch.cat(tuple(features))

    def inputs(
        self, pair: Pair, side: str, room: int = NEW, counts: str = MIXED
    ) -> dict[str, np.ndarray]:
        image, numbers = self.image_ids(pair), IMAGE_COUNTS[counts]
        # One shape for all counts: that of the mixed batch.
        length = max(map(len, random_rows(IMAGE_COUNTS[MIXED], image))) + room
        return padded(random_rows(numbers, image), side, length) | self.pixels(numbers)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_logits_are_those_of_transformers(self, pair, counts, side):
        assert_logits_are_equal(pair, self.ATOL, **self.inputs(pair, side, counts=counts))

    def test_image_features_are_those_of_transformers(self, pair):
        inputs = self.inputs(pair, "left")
        features = self.image_features(pair, inputs)
        assert_image_features_are_equal(pair, features, self.FEATURES_ATOL, **inputs)

    def test_the_tensor_names_of_transformers_5_load_too(self, pair, tmp_path):
        """Names of its modules in memory, which differ from the names in its files."""
        pair.hf.save_pretrained(tmp_path, save_original_format=False)
        inputs = self.inputs(pair, "left")
        assert_logits_are_equal(Pair.load(pair.hf, tmp_path), self.ATOL, **inputs)
