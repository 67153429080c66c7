"""Loading straight into the mesh's shards, in little more memory than the checkpoint has."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from transformers import LlamaConfig, LlamaForCausalLM

from tests.hub.parity import SMALL, saved
from vlm_jax import axes
from vlm_jax.config import ConfigError, Mesh
from vlm_jax.hub.files import open_tensors, write_tensors
from vlm_jax.hub.load import load_params
from vlm_jax.nn.models import boxed_params

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("llama")
    saved(LlamaForCausalLM(LlamaConfig(**SMALL)), where)
    return where


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1)])
def test_parameters_lie_in_the_shards_of_the_mesh_and_are_the_same(folder, sizes):
    mesh = axes.make_mesh(Mesh(*sizes))
    model, params = load_params(folder, mesh=mesh)
    alone = traverse_util.flatten_dict(load_params(folder, mesh=axes.make_mesh(Mesh(1, 1, 1), jax.devices()[:1]))[1])
    boxes = traverse_util.flatten_dict(boxed_params(model.cfg))
    split = 0
    for path, x in traverse_util.flatten_dict(params).items():
        spec = axes.parameter_spec(boxes[path].letters, x.shape, mesh)
        assert x.sharding == jax.sharding.NamedSharding(mesh, spec), path
        split += x.addressable_shards[0].data.size < x.size
        np.testing.assert_array_equal(x, alone[path], err_msg=str(path))
    assert (split > 5) == (sizes != (8, 1, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_can_be_asked_for(folder, dtype):
    _, params = load_params(folder, dtype=dtype)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}


def test_every_tensor_that_is_wrong_is_listed_and_nothing_is_loaded(folder, tmp_path):
    with open_tensors(folder) as stored:
        tensors = {name: tensor.read() for name, tensor in stored.items()}
    tensors["model.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros((2, 2), np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    write_tensors(tmp_path, tensors, tensors.get)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError) as error:
        load_params(tmp_path)
    for said in (
        "lm_head.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.extra.weight is unknown",
        "model.norm.weight has the shape (2, 2), not (32,)",
    ):
        assert said in str(error.value)


# ---- memory


def benchmark():
    spec = importlib.util.spec_from_file_location("loading", ROOT / "experiments" / "benchmarks" / "loading.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory):
    """A checkpoint of 1.07 GB, and its size in bytes."""
    where = tmp_path_factory.mktemp("gigabyte")
    yield where, benchmark().write_checkpoint(where, "float32")
    (where / "model.safetensors").unlink()


LOAD = """
import resource, sys
from vlm_jax import axes
from vlm_jax.config import Mesh
from vlm_jax.hub.load import load_params
params = load_params(sys.argv[1], mesh=axes.make_mesh(Mesh(1, int(sys.argv[2]), 1)))[1]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.parametrize("devices", [1, 8])
def test_a_gigabyte_takes_little_more_than_its_size(gigabyte, devices):
    """On one device, and split over the shards of eight."""
    where, size = gigabyte
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LOAD, str(where), str(devices)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert size < int(done.stdout) <= 1.2 * size + 0.5e9
