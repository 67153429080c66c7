"""GPT-2: outputs equal to transformers', exact export."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from tests.hub.unified import DecoderLaws, Pair, new_pair
from vlm_jax.config import UserError
from vlm_jax.hub.families.decoders import gpt2
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
UNTIED = {"tie_word_embeddings": False, "n_inner": 48, "activation_function": "gelu"}


class TestGpt2(DecoderLaws):
    MODELS = {
        "as published": (GPT2LMHeadModel, GPT2Config(**TEXT)),
        "untied": (GPT2LMHeadModel, GPT2Config(**TEXT | UNTIED)),
    }
    CACHED = ("as published",)
    SEED = 1


def test_the_published_file_has_no_prefix_and_unused_masks(tmp_path):
    pair = new_pair(GPT2LMHeadModel(GPT2Config(**TEXT)), tmp_path / "hub")
    tensors = load_file(tmp_path / "hub" / WEIGHTS)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for n in range(TEXT["n_layer"]):
        tensors[f"h.{n}.attn.bias"] = torch.ones(1, 1, 32, 32)
        tensors[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "published").mkdir()
    save_file(tensors, tmp_path / "published" / WEIGHTS)
    pair.hf.config.save_pretrained(tmp_path / "published")
    _, params = load_params(tmp_path / "published")
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)


def test_a_model_without_a_head_has_the_tied_one_or_is_incomplete(tmp_path):
    tied = new_pair(GPT2Model(GPT2Config(**TEXT)), tmp_path / "tied")
    assert tied.cfg.decoder.tie_word_embeddings
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        new_pair(GPT2Model(GPT2Config(**TEXT | UNTIED)), tmp_path / "untied")


def test_a_copy_of_the_tied_embedding_is_not_a_head_but_another_tensor_is(tmp_path):
    """pytorch_model.bin files store the copy."""
    folder = tmp_path / "hub"
    pair = new_pair(GPT2LMHeadModel(GPT2Config(**TEXT)), folder)
    inputs = {"input_ids": np.arange(9)[None]}
    tensors = {name: tensor.clone() for name, tensor in pair.hf.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    again = Pair.load(pair.hf, folder)
    assert again.cfg.decoder.tie_word_embeddings
    np.testing.assert_allclose(again.logits(**inputs), pair.logits(**inputs), atol=1e-5)
    save_file(tensors | {"lm_head.weight": 2 * tensors["lm_head.weight"]}, folder / WEIGHTS)
    doubled = Pair.load(pair.hf, folder)
    assert not doubled.cfg.decoder.tie_word_embeddings
    np.testing.assert_allclose(doubled.logits(**inputs), 2 * pair.logits(**inputs), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "tanh"},
    ],
)
def test_unsupported_settings_are_refused(change):
    with pytest.raises(UserError, match=f"config.json: {next(iter(change))}"):
        gpt2.config_from_hf(TEXT | change, ())
