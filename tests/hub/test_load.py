"""Invalid values in config.json raise one sentence with the file's name before anything loads."""

import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.hub import tiny_checkpoints as tiny
from vlm_jax import axes
from vlm_jax.config import Mesh, UserError
from vlm_jax.config.validate import check_values
from vlm_jax.hub.families.decoders import gpt2, trocr
from vlm_jax.hub.families.encoders import mllama_vision
from vlm_jax.hub.families.family import positive_int, positive_number
from vlm_jax.hub.families.registry import find_family
from vlm_jax.hub.load import inspect, load_params
from vlm_jax.hub.tensors.folder import open_tensors


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
    """Loads on all devices, unlike the other tests of this folder."""


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.llava(tmp_path_factory.mktemp("llava")).path


def refusal(folder, target, part: str, key: str, value) -> str:
    """The message for a folder with another value in its config.json; None: without the key."""
    config = json.loads((folder / "config.json").read_text())
    where = config[part] if part else config
    where[key] = value
    if value is None:
        del where[key]
    for path in folder.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error, open_tensors(target) as tensors:
        _ = inspect(target, tensors).image_token
    assert "\n" not in str(error.value)
    assert str(target) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        ("", "model_type", [], r"choose from blip-2, clip, .*, vit"),
        ("", "model_type", "someting", r"choose from blip-2, clip, .*, vit"),
        ("", "image_token_index", [], "must be an id"),
        ("", "text_config", "abc", "invalid value"),
        ("", "multimodal_projector_bias", {}, "projector.bias is {}"),
        ("text_config", "hidden_size", None, "has the shape"),
        ("text_config", "hidden_size", 0, "hidden_size is 0, but must be an integer from 1"),
        ("text_config", "hidden_size", 33, "has the shape"),
        ("text_config", "num_attention_heads", 0, "num_attention_heads is 0"),
        ("text_config", "num_attention_heads", "4", "num_attention_heads is '4'"),
        ("text_config", "num_key_value_heads", 3, "kv_heads 3"),
        ("text_config", "num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("text_config", "num_hidden_layers", 2**70, "num_hidden_layers is .* from 1 to 2147483647"),
        (
            "text_config",
            "num_attention_heads",
            3,
            "decoder.heads 3 is not a multiple of decoder.kv_heads 2",
        ),
        ("text_config", "num_key_value_heads", "2", "num_key_value_heads is '2'"),
        ("text_config", "head_dim", -1, "head_dim is -1"),
        ("text_config", "vocab_size", "abc", "vocab_size is 'abc'"),
        ("text_config", "rms_norm_eps", "abc", "decoder.norm_eps is 'abc'"),
        ("text_config", "rms_norm_eps", float("nan"), "decoder.norm_eps is nan"),
        ("text_config", "rope_parameters", "abc", "invalid value"),
        ("text_config", "rope_parameters", {"rope_type": "llama3"}, "the key .* is missing"),
        ("vision_config", "image_size", 10**7, "vision.image_size_px is 10000000"),
        ("vision_config", "patch_size", 0, "patch_size is 0"),
        ("vision_config", "num_attention_heads", 5, "multiple of vision.heads 5"),
    ],
)
def test_invalid_values_are_refused(llava, tmp_path, part, key, value, message):
    error = refusal(llava, tmp_path, part, key, value)
    assert re.search(message, error), error


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_quantized_weights_are_named(llava, tmp_path, dtype):
    tensors = load_file(llava / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "model.safetensors")
    shutil.copy(llava / "config.json", tmp_path)
    with (
        pytest.raises(UserError, match=f"quantized weights are not supported: {name} is "),
        open_tensors(tmp_path) as stored,
    ):
        inspect(tmp_path, stored)


def test_8_bit_floats_are_quantized_if_the_config_names_a_method(llava, tmp_path):
    """Their scales were listed, hundreds of them, as unknown tensors."""
    tensors = load_file(llava / "model.safetensors")
    matrices = [name for name, x in tensors.items() if x.ndim == 2]
    for name in matrices:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    scales = {f"{name}_scale_inv": torch.ones(1) for name in matrices}
    config = json.loads((llava / "config.json").read_text())
    save_file(tensors | scales, tmp_path / "model.safetensors")
    config |= {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_tensors(tmp_path) as stored, pytest.raises(UserError) as raised:
        inspect(tmp_path, stored)
    count = len(matrices) - 3
    message = f"quantized weights are not supported: .* is float8_e4m3fn and {count} more. Use the"
    assert re.search(message, str(raised.value))


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
TEXT, VISION = (
    (*SIZES, "vocab_size", "max_position_embeddings"),
    (*SIZES, "image_size", "patch_size"),
)
KEYS = {  # part of config.json -> keys that hold a size
    "gpt2": {"": ("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size")},
    "llama": {"": (*TEXT, "num_key_value_heads", "head_dim")},
    "qwen3": {"": (*TEXT, "num_key_value_heads", "head_dim")},
    "smollm3": {"": (*TEXT, "num_key_value_heads", "no_rope_layer_interval")},
    "phi3": {"": TEXT},
    "gemma3_text": {"": (*TEXT, "num_key_value_heads", "head_dim", "sliding_window_pattern")},
    "clip": {"": ("projection_dim",), "text_config": TEXT, "vision_config": VISION},
    "siglip": {"text_config": TEXT, "vision_config": VISION},
    "vit": {"": VISION},
    "dinov2": {"": (*SIZES[:3], "mlp_ratio", "image_size", "patch_size")},
    "mllama": {
        "text_config": TEXT,
        "vision_config": ("attention_heads", "num_global_layers", "max_num_tiles"),
    },
    "fuyu": {"": ("image_size", "patch_size"), "text_config": TEXT},
    "vision-encoder-decoder": {
        "decoder": ("d_model", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim")
    },
}


def config_with(kind: str, part: str = "", **keys) -> dict:
    parts = {name: {} for name in KEYS[kind] if name} | {"model_type": kind}
    if "decoder" in parts:
        parts["decoder"] = {"model_type": "trocr"}
    return {**parts, part: {**parts[part], **keys}} if part else parts | keys


def check_config(config: dict) -> None:
    check_values(find_family(config, "config.json").config_from_hf(config, ()))


@pytest.mark.parametrize("kind", KEYS)
def test_every_size_is_checked_and_named_by_its_key(kind):
    check_config(config_with(kind))
    for part, keys in KEYS[kind].items():
        for key, value in itertools.product(keys, (0, "7")):
            named = rf"\b{key}\b|(mlp_width|image_size_px|patch_size_px) is"
            with pytest.raises(UserError, match=named):
                check_config(config_with(kind, part, **{key: value}))


@pytest.mark.parametrize("value", [0, -1, 2**70, "7", [3, 4], {}, True, 1.5])
def test_a_size_is_an_integer_from_1(value):
    with pytest.raises(UserError, match="config.json: hidden_size is .* from 1 to 2147483647"):
        positive_int({"hidden_size": value}, "hidden_size")
    with pytest.raises(UserError, match=r"\bimage_size\b|image_size_px is"):
        check_config(config_with("vit", image_size=value))


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), "7", [3, 4], {}, True])
def test_a_ratio_is_a_number_above_0(value):
    with pytest.raises(UserError, match="config.json: mlp_ratio is .* a number above 0"):
        positive_number({"mlp_ratio": value}, "mlp_ratio")


ALIASES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "trocr": {
        "hidden_size": "d_model",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
    },
    "mllama_vision_model": {"num_attention_heads": "attention_heads"},
}
READERS = {
    "gpt2": lambda config: gpt2.decoder_from_hf(config, ()),
    "trocr": lambda config: trocr.decoder_from_hf(config, ()),
    "mllama_vision_model": lambda config: mllama_vision.vision_from_hf(config, "input"),
}


@pytest.mark.parametrize("kind", ALIASES)
def test_keys_have_the_aliases_of_transformers_which_override_them(kind):
    assert transformers.AutoConfig.for_model(kind).attribute_map == ALIASES[kind]
    sizes = dict(zip(ALIASES[kind], (32, 2, 4, 64)))
    named = {name: sizes[alias] for alias, name in ALIASES[kind].items()}
    expected = READERS[kind](named)
    assert READERS[kind](sizes) == expected
    assert READERS[kind](dict.fromkeys(named, 8) | sizes) == expected
    assert READERS[kind](named | dict.fromkeys(sizes)) == expected


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["no mesh", "mesh"])
def test_parameters_are_the_same_on_all_devices_as_on_one(llava, sizes):
    one = axes.make_mesh(Mesh(), jax.devices()[:1])
    mesh = None if sizes is None else axes.make_mesh(Mesh(*sizes))
    params = load_params(llava, mesh=mesh)[1]
    jax.tree.map(np.testing.assert_array_equal, params, load_params(llava, mesh=one)[1])
    shardings = [x.sharding for x in jax.tree.leaves(params)]
    assert all(sharding.device_set == set(jax.devices()) for sharding in shardings)
    # Without a mesh, every device holds everything.
    assert all(sharding.is_fully_replicated for sharding in shardings) == (sizes is None)


def test_a_training_step_compiles_once_on_one_device(llava, monkeypatch):
    """Parameters are not committed to a device: outputs of a step have the layout of its inputs."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    _, params = load_params(llava)

    @jax.jit
    def step(params, count):
        return jax.tree.map(lambda x: 0.5 * x, params), count + 1

    count = jnp.zeros((), int)
    for _ in range(2):
        params, count = step(params, count)
    assert step._cache_size() == 1
