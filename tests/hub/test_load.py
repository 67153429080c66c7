"""A config.json can say anything: what no model can be is a sentence that names the file, before anything is loaded."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hub import tiny_checkpoints as tiny
from vlm_jax.config import ConfigError
from vlm_jax.hub.files import open_tensors
from vlm_jax.hub.load import inspect


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.llava(tmp_path_factory.mktemp("llava")).path


def refusal(folder, target, part: str, key: str, value) -> str:
    """What is said of the folder with another value in its config.json; None: without the key."""
    config = json.loads((folder / "config.json").read_text())
    where = config[part] if part else config
    where[key] = value
    if value is None:
        del where[key]
    for path in folder.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error, open_tensors(target) as tensors:
        _ = inspect(target, tensors).image_token
    assert "\n" not in str(error.value)
    assert str(target) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "part, key, value, said",
    [
        ("", "model_type", [], r"choose clip, .*, vit"),
        ("", "model_type", "someting", r"choose clip, .*, vit"),
        ("", "image_token_index", [], "has to be an id"),
        ("", "text_config", "abc", "not understood"),
        ("", "multimodal_projector_bias", {}, "projector.bias is {}"),
        ("text_config", "hidden_size", None, "has the shape"),
        ("text_config", "hidden_size", 0, "decoder.width is 0"),
        ("text_config", "hidden_size", 33, "has the shape"),
        ("text_config", "num_attention_heads", 0, "not understood: integer division"),
        ("text_config", "num_attention_heads", "4", "not understood: unsupported operand"),
        ("text_config", "num_key_value_heads", 3, "kv_heads 3"),
        ("text_config", "num_hidden_layers", 0, "decoder.depth is 0"),
        ("text_config", "num_hidden_layers", 2**70, "decoder.depth is .* at most"),
        ("text_config", "num_attention_heads", 3, "decoder.heads 3 is not a multiple of decoder.kv_heads 2"),
        ("text_config", "num_key_value_heads", "2", "decoder.kv_heads is '2': it must be int"),
        ("text_config", "head_dim", -1, "decoder.head_dim is -1"),
        ("text_config", "vocab_size", "abc", "decoder.vocab_size is 'abc'"),
        ("text_config", "rms_norm_eps", "abc", "decoder.norm_eps is 'abc'"),
        ("text_config", "rms_norm_eps", float("nan"), "decoder.norm_eps is nan"),
        ("text_config", "rope_parameters", "abc", "not understood"),
        ("text_config", "rope_parameters", {"rope_type": "llama3"}, "lacks the key"),
        ("vision_config", "image_size", 10**7, "vision.image_size_px is 10000000"),
        ("vision_config", "patch_size", 0, "vision.patch_size_px is 0"),
        ("vision_config", "num_attention_heads", 5, "multiple of vision.heads 5"),
    ],
)
def test_what_no_model_can_be_is_refused(llava, tmp_path, part, key, value, said):
    error = refusal(llava, tmp_path, part, key, value)
    assert re.search(said, error), error


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_weights_that_are_no_floating_point_numbers_are_named(llava, tmp_path, dtype):
    tensors = load_file(llava / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "model.safetensors")
    shutil.copy(llava / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=f"no floating-point numbers: {name} is "), open_tensors(tmp_path) as stored:
        inspect(tmp_path, stored)
