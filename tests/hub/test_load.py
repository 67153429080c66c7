"""A config.json can say anything: what no model can be is a sentence that names the file, before anything is loaded."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.hub import tiny_checkpoints as tiny
from vlm_jax.config import UserError
from vlm_jax.config.validate import check_values
from vlm_jax.hub.families import gpt2, mllama_vision, trocr
from vlm_jax.hub.families.registry import family_of
from vlm_jax.hub.load import inspect
from vlm_jax.hub.tensors.folder import open_tensors


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
    with pytest.raises(UserError) as error, open_tensors(target) as tensors:
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
        ("text_config", "rope_parameters", "abc", "not understood"),
        ("text_config", "rope_parameters", {"rope_type": "llama3"}, "lacks the key"),
        ("vision_config", "image_size", 10**7, "vision.image_size_px is 10000000"),
        ("vision_config", "patch_size", 0, "patch_size is 0"),
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
    with (
        pytest.raises(UserError, match=f"no floating-point numbers: {name} is "),
        open_tensors(tmp_path) as stored,
    ):
        inspect(tmp_path, stored)


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
TEXT, VISION = (
    (*SIZES, "vocab_size", "max_position_embeddings"),
    (*SIZES, "image_size", "patch_size"),
)
KEYS = {  # part of config.json -> keys that hold a size
    "gpt2": {"": ("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size")},
    "llama": {"": (*TEXT, "num_key_value_heads", "head_dim")},
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
PARTS = [
    (kind, part, key)
    for kind, parts in KEYS.items()
    for part, keys in parts.items()
    for key in keys
]


@pytest.mark.parametrize("kind, part, key", PARTS, ids=lambda x: x or "-")
def test_a_size_that_is_not_a_whole_number_above_0_is_refused_by_its_key(kind, part, key):
    parts = {name: {} for name in KEYS[kind] if name} | {"model_type": kind}
    if "decoder" in parts:
        parts["decoder"] = {"model_type": "trocr"}
    for value in (0, -1, 2**70, "7", [3, 4], {}, True, *(() if key == "mlp_ratio" else (1.5,))):
        config = {**parts, part: {**parts[part], key: value}} if part else parts | {key: value}
        with pytest.raises(
            UserError, match=rf"\b{key}\b|(mlp_width|image_size_px|patch_size_px) is"
        ):
            check_values(family_of(config, "config.json").config_from_hf(config, ()))
    check_values(family_of(parts, "config.json").config_from_hf(parts, ()))


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


STEPS = """
import sys, jax, vlm_jax
model, params, processor = vlm_jax.from_pretrained(sys.argv[1])
batch = processor("hello")

@jax.jit
def step(params, count):
    grads = jax.grad(lambda params: model.apply({"params": params}, batch).logits.sum())(params)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), count + 1

count = jax.numpy.zeros((), int)
for _ in range(2):
    params, count = step(params, count)
print("compiled", step._cache_size(), "devices", jax.device_count())
"""


def test_a_training_step_compiles_once_on_one_device(llava):
    """Its outputs lie as its inputs do, whatever is trained beside the parameters."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "PYTHONPATH": os.getcwd()
    }
    command = [sys.executable, "-c", STEPS, str(llava)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "compiled 1 devices 1" in done.stdout, done.stderr
