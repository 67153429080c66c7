"""GPT-2: our outputs are those of transformers, and what is exported is what was loaded."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from tests.hub.unified import (
    Pair,
    assert_an_export_is_what_was_loaded,
    assert_blocks_are_equal,
    assert_greedy_tokens_are_equal,
    assert_logits_are_equal,
    new_pair,
    padded,
)
from vlm_jax.config import UserError
from vlm_jax.hub.families import gpt2
from vlm_jax.hub.load import load_params
from vlm_jax.hub.tensors.folder import WEIGHTS

TEXT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
}
TEXT |= {"eos_token_id": None}
CONFIGS = {
    "as published": GPT2Config(**TEXT),
    "untied": GPT2Config(**TEXT, tie_word_embeddings=False, n_inner=48, activation_function="gelu"),
}
every_model = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture
def model(kind, tmp_path):
    return new_pair(GPT2LMHeadModel(CONFIGS[kind]), tmp_path / "hub")


def texts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, 64, length).tolist() for length in (7, 12)]


@every_model
def test_logits_are_those_of_transformers(model):
    for side in ("left", "right"):
        assert_logits_are_equal(model, 1e-4, **padded(texts(), side))


@every_model
def test_blocks_are_those_of_transformers_in_order(model):
    assert_blocks_are_equal(model, 1e-4, **padded(texts(), "right"))


@every_model
def test_greedy_tokens_are_those_of_transformers(model):
    assert_greedy_tokens_are_equal(model, **padded(texts(), "left"))


@every_model
def test_an_export_is_what_was_loaded_and_transformers_loads_it(model, tmp_path):
    assert_an_export_is_what_was_loaded(model, tmp_path / "ours", 1e-4, padded(texts(), "right"))


@pytest.mark.parametrize("kind", ["as published"])
def test_the_published_file_has_no_prefix_and_masks_that_nobody_reads(model, tmp_path):
    tensors = load_file(model.checkpoint.folder / WEIGHTS)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for n in range(TEXT["n_layer"]):
        tensors[f"h.{n}.attn.bias"] = torch.ones(1, 1, 32, 32)
        tensors[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "published").mkdir()
    save_file(tensors, tmp_path / "published" / WEIGHTS)
    model.theirs.config.save_pretrained(tmp_path / "published")
    _, params = load_params(tmp_path / "published")
    jax.tree.map(np.testing.assert_array_equal, params, model.params)


def test_a_model_without_a_head_has_the_tied_one_or_is_incomplete(tmp_path):
    assert new_pair(
        GPT2Model(GPT2Config(**TEXT)), tmp_path / "tied"
    ).cfg.decoder.tie_word_embeddings
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        new_pair(GPT2Model(CONFIGS["untied"]), tmp_path / "untied")


def test_a_copy_of_the_tied_embedding_is_no_head_and_another_one_is(tmp_path):
    """As .bin files have it."""
    pair = new_pair(GPT2LMHeadModel(GPT2Config(**TEXT)), tmp_path / "hub")
    tensors = {name: tensor.clone() for name, tensor in pair.theirs.state_dict().items()}
    save_file(tensors, tmp_path / "hub" / WEIGHTS)
    again = Pair.of(pair.theirs, tmp_path / "hub")
    assert again.cfg.decoder.tie_word_embeddings
    ids = np.arange(9)[None]
    np.testing.assert_allclose(again.logits(input_ids=ids), pair.logits(input_ids=ids), atol=1e-5)
    save_file(
        tensors | {"lm_head.weight": 2 * tensors["lm_head.weight"]}, tmp_path / "hub" / WEIGHTS
    )
    doubled = Pair.of(pair.theirs, tmp_path / "hub")
    assert not doubled.cfg.decoder.tie_word_embeddings
    np.testing.assert_allclose(
        doubled.logits(input_ids=ids), 2 * pair.logits(input_ids=ids), atol=1e-5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "tanh"},
    ],
)
def test_what_is_not_supported_is_refused(change):
    with pytest.raises(UserError, match=f"config.json: {next(iter(change))}"):
        gpt2.config_from_hf(TEXT | change, ())
