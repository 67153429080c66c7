"""Adapters that PEFT wrote are merged as PEFT merges them, in every family, or refused by name."""

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import pytest
import torch
from flax import traverse_util
from peft import LoraConfig
from safetensors.numpy import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
)

import vlm_jax
from tests.hub import tiny_checkpoints
from tests.hub.parity import SMALL, reference, saved
from vlm_jax.cli.main import main
from vlm_jax.config import CheckpointError
from vlm_jax.hub.load import load_params
from vlm_jax.hub.peft.adapter import CONFIG, read_adapter

WEIGHTS = "adapter_model.safetensors"


class Tuned(NamedTuple):
    base: Path
    adapter: Path
    model: torch.nn.Module  # of PEFT, merged


def llava(path):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny_checkpoints.TOWER),
        text_config=LlamaConfig(**SMALL),
        image_token_index=63,
    )
    return saved(LlavaForConditionalGeneration(config), path)


def phi3(path):
    config = Phi3Config(**SMALL, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    return saved(Phi3ForCausalLM(config), path)


def llama(path):
    return saved(LlamaForCausalLM(LlamaConfig(**SMALL)), path)


def hub(name):
    return lambda path: getattr(tiny_checkpoints, name)(path).model


# Base model, and settings of PEFT.
CASES = {
    # Encoder and decoder, the projector whole, ranks and alphas by regular expression.
    "llava": (
        llava,
        {
            "target_modules": r".*\.(q_proj|fc1|down_proj)",
            "modules_to_save": ["multi_modal_projector"],
            "rank_pattern": {r"vision_tower\..*\.fc1": 5, r"layers\.1\.mlp\.down_proj": 2},
            "alpha_pattern": {"q_proj": 7.5},
            "use_rslora": True,
        },
    ),
    "phi3": (phi3, {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    # Conv1D, some of them square; the fused projection of queries, keys and values.
    "vit_gpt2": (
        hub("vit_gpt2"),
        {"target_modules": ["c_attn", "c_proj", "q_attn", "c_fc", "fc2", "enc_to_dec_proj"]},
    ),
    # Gated cross-attention, the tiled encoder and the projector.
    "mllama": (hub("mllama"), {"target_modules": "all-linear"}),
    # Queries, keys and values interleaved by head.
    "fuyu": (hub("fuyu"), {"target_modules": ["query_key_value", "dense", "vision_embed_tokens"]}),
}


def wrap(model, path, **settings):
    """Wraps a model with random adapters, and saves them."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False} | settings
    with warnings.catch_warnings():
        # PEFT corrects fan_in_fan_out of Conv1D layers itself.
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    wrapped.save_pretrained(path)
    return wrapped


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    made = {}

    def tune(name) -> Tuned:
        if name not in made:
            build, settings = CASES[name]
            base, adapter = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("adapter")
            model = wrap(build(base), adapter, **settings)
            made[name] = Tuned(base, adapter, model.merge_and_unload().eval())
        return made[name]

    return tune


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize("name", CASES)
def test_a_merged_adapter_is_that_of_peft(name, tuned, tmp_path):
    base, adapter, model = tuned(name)
    model.save_pretrained(tmp_path)
    expected = flat(load_params(tmp_path)[1])
    merged, before = [flat(load_params(base, adapter=x)[1]) for x in (adapter, None)]
    changed = {path for path, x in before.items() if not np.array_equal(x, merged[path])}
    assert changed == {path for path, x in before.items() if not np.array_equal(x, expected[path])}
    assert any("decoder" in path for path in changed)
    for path, x in expected.items():
        np.testing.assert_allclose(merged[path], x, atol=1e-6, err_msg=path)


@pytest.fixture
def phi3_case(tuned, tmp_path):
    """Command-line options of a base and its adapter, and a reference of PEFT."""
    base, adapter, model = tuned("phi3")
    ids = np.random.default_rng(0).integers(1, 64, (2, 9))
    arrays = {"a/in/input_ids": ids, "a/out/logits": reference(model, input_ids=ids)}
    np.savez(tmp_path / "reference.npz", **arrays)
    return base, adapter, tmp_path / "reference.npz"


def test_verify_compares_with_an_adapter_and_export_merges_it(phi3_case, tmp_path, capsys):
    base, adapter, reference_file = map(str, phi3_case)
    merged = str(tmp_path / "merged")
    compare = ["verify", "--reference", reference_file, "--checkpoint"]
    assert main([*compare, base, "--adapter", adapter]) == 0
    assert main([*compare, base]) == 1
    assert main(["export", "--checkpoint", base, "--adapter", adapter, "--output", merged]) == 0
    assert main([*compare, merged]) == 0


@pytest.fixture
def adapter(tuned, tmp_path):
    """A copy of an adapter for Phi-3: base, folder, and a function that writes it with changes."""
    base, folder, _ = tuned("phi3")
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)

    def write(changes=None, edit=lambda tensors: tensors):
        (tmp_path / CONFIG).write_text(json.dumps(config | (changes or {})))
        save_file(edit(tensors), tmp_path / WEIGHTS)

    return base, tmp_path, write


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA is not supported, only LORA"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias all is not supported"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa is not supported, because"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices \[3\] is not supported"),
        ({"a_later_method": {"x": 1}}, "a_later_method .* is not supported"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern '\(' is not a regular expression"),
        ({"alpha_pattern": {"qkv_proj": "x"}}, "alpha_pattern 'qkv_proj' is 'x', but must be a"),
        ({"r": 4}, r"_proj do not have the rank 4 of adapter_config.json"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(adapter, changes, message):
    _, folder, write = adapter
    write(changes)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder)


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


@pytest.mark.parametrize(
    "edit, message",
    [
        (renamed("lora_A.weight", "lora_embedding_A"), "lora_embedding_A is not supported"),
        (renamed("lora_B", "lora_magnitude_vector"), "lora_magnitude_vector.* is not supported"),
        (renamed(".lora_", ".other_"), "holds no tensor lora_A.weight: it adapts nothing"),
        (
            lambda tensors: {name: x for name, x in tensors.items() if "lora_B" in name},
            "lora_A.weight is missing",
        ),
    ],
)
def test_tensors_that_are_not_understood_are_refused(adapter, edit, message):
    _, folder, write = adapter
    write(edit=edit)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder)


def wider(name, x):
    return np.tile(x, (1, 2)) if "lora_A" in name else x


def test_an_adapter_of_another_model_is_refused_with_its_tensors(adapter, tuned, tmp_path):
    base, folder, write = adapter
    write(edit=renamed("qkv_proj", "q_proj"))
    with pytest.raises(
        CheckpointError,
        match=r"belongs to another model: model.layers.0.self_attn.q_proj.weight is unknown; .*",
    ):
        load_params(base, adapter=folder)
    write(edit=lambda tensors: {name: wider(name, x) for name, x in tensors.items()})
    with pytest.raises(CheckpointError, match=r"shape \(96, 64\), not \(96, 32\); .* and 6 more"):
        vlm_jax.from_pretrained(base, adapter=folder)


def test_a_saved_embedding_that_is_the_head_too_is_refused(tmp_path):
    model = saved(LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)), tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"changes model.embed_tokens.weight, .* head"):
        load_params(tmp_path / "b", adapter=tmp_path / "a")


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a PEFT adapter: it has no adapter_config"):
        read_adapter(tmp_path)
