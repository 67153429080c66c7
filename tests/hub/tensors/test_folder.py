"""Weight files of a folder: reading, writing, and the memory they take."""

import gzip
import json
import mmap
import resource
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.hub.tensors.tensor_files import (
    ZIP,
    assert_same,
    both_formats,
    refusal,
    save_torch,
    write,
)
from vlm_jax.config import UserError
from vlm_jax.hub.tensors import folder as files
from vlm_jax.hub.tensors.folder import open_tensors, read_json, write_tensors


@pytest.mark.parametrize("name", files.READABLE)
def test_all_names_of_weights_are_found_and_the_best_is_taken(tmp_path, name):
    for better in files.READABLE[files.READABLE.index(name) :]:
        tensors = {"a": torch.full((2,), float(better == name))}
        if better.endswith(".bin"):
            save_torch(tmp_path, tensors, ZIP, better)
        else:
            safetensors.torch.save_file(tensors, tmp_path / better)
    assert_same(open_tensors(str(tmp_path)), {"a": torch.ones(2)})


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    assert f"{tmp_path / 'none'} is not a folder: it does not exist" in refusal(tmp_path / "none")
    assert "~nobody_here/x is not a folder" in refusal("~nobody_here/x")
    (tmp_path / "file").touch()
    assert "is a file: name the folder that holds the checkpoint" in refusal(tmp_path / "file")
    assert all(name in refusal(tmp_path) for name in (str(tmp_path), *files.READABLE, files.INDEX))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    assert "is an adapter of PEFT, not a whole model: name its base model, a/base" in refusal(
        tmp_path
    )


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    )


def test_the_shards_of_transformers_are_read(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tied = {"lm_head.weight"}  # the same tensor as the embedding, so it is not saved
    assert_same(
        open_tensors(tmp_path),
        {name: t for name, t in gpt2.state_dict().items() if name not in tied},
    )


def test_shards_of_torch_files_are_read(tmp_path):
    shards = {
        "pytorch_model-1.bin": {"a": torch.ones(2), "b": torch.ones(3)},
        "pytorch_model-2.bin": {"c": torch.ones(())},
    }
    for name, tensors in shards.items():
        save_torch(tmp_path, tensors, ZIP, name)
    index = {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(
        open_tensors(tmp_path),
        {name: t for tensors in shards.values() for name, t in tensors.items()},
    )


@pytest.mark.parametrize("max_shard_bytes", [1, 40_000, 10**9])
def test_what_is_written_is_read_by_transformers(tmp_path, gpt2, max_shard_bytes):
    arrays = {name: tensor.numpy() for name, tensor in gpt2.state_dict().items()}
    write(tmp_path, arrays, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes == 10**9)
    gpt2.config.save_pretrained(tmp_path)
    loaded, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, gpt2.state_dict()[name]), name
    assert_same(open_tensors(tmp_path), gpt2.state_dict())


@pytest.mark.parametrize(
    ("max_shard_bytes", "shards"),
    [(100, [["a", "b", "c", "d"]]), (52, [["a", "b", "c", "d"]]), (51, [["a", "b", "c"], ["d"]]),
     (16, [["a", "b"], ["c"], ["d"]]), (1, [["a"], ["b"], ["c"], ["d"]])],
)  # fmt: skip
def test_shards_keep_the_order_and_the_limit(tmp_path, max_shard_bytes, shards):
    """A tensor that is larger than the limit is alone."""
    arrays = {
        name: np.zeros(size, np.int8) for name, size in {"a": 8, "b": 8, "c": 32, "d": 4}.items()
    }
    write(tmp_path, arrays, max_shard_bytes=max_shard_bytes)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(safetensors.numpy.load_file(path)) for path in paths] == shards
    if len(shards) > 1:
        n = len(shards)
        assert [path.name for path in paths] == [
            f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)
        ]
        index = read_json(tmp_path / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == 52
        assert index["weight_map"] == {
            name: path.name for path, names in zip(paths, shards) for name in names
        }


@pytest.fixture
def sharded(tmp_path) -> Path:
    write(tmp_path, {"a": np.ones(4), "b": np.ones(4)}, max_shard_bytes=1)
    return tmp_path


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model.safetensors.index.json names missing files: model-00002-of-00002" in refusal(
        sharded
    )


def test_a_shard_that_lacks_a_tensor_is_named(sharded):
    other = sharded / "other"
    write(other, {"c": np.ones(4)})
    (other / "model.safetensors").rename(sharded / "model-00002-of-00002.safetensors")
    said = refusal(sharded)
    assert (
        "index.json maps b to model-00002-of-00002.safetensors, which does not contain it" in said
    )


def test_a_shard_that_is_cut_short_is_named(sharded):
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is truncated" in refusal(sharded)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../a"}},
        {"weight_map": {"a": "/a"}},
    ],
)
def test_an_index_without_a_map_to_files_beside_it_is_refused(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json has no weight_map" in refusal(sharded)


# ---- writing


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_tensor_at_a_time_is_asked_for(tmp_path):
    arrays, asked = {name: np.zeros(3) for name in "dbca"}, []
    write_tensors(
        tmp_path, arrays, lambda name: asked.append(name) or arrays[name], max_shard_bytes=48
    )
    assert asked == ["b", "d", "a", "c"]  # two shards, each in the order of its file


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 1])
def test_an_error_in_the_middle_leaves_no_file(tmp_path, error, max_shard_bytes):
    def read(name):
        if name == "c":
            assert files_in(tmp_path) == {".partial"}
            raise error
        return np.zeros(3)

    with pytest.raises(error):
        write_tensors(tmp_path, {name: np.zeros(3) for name in "abcd"}, read, max_shard_bytes)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros((3, 1)), np.zeros(3, np.float32)])
def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected float64"):
        write_tensors(tmp_path, {"a": np.zeros(3)}, lambda name: wrong)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype(">f4"), np.dtype("U3")])
def test_a_dtype_that_safetensors_does_not_know_is_refused(tmp_path, dtype):
    with pytest.raises(UserError, match="a is .*safetensors supports"):
        write(tmp_path / "new", {"a": np.zeros(3, dtype)})
    assert not files_in(tmp_path)


def test_weights_that_are_there_are_not_overwritten(tmp_path):
    save_torch(tmp_path, {"a": torch.ones(2)}, ZIP)
    with pytest.raises(UserError, match=r"pytorch_model\.bin already exists"):
        write(tmp_path, {"a": np.zeros(2)})
    assert files_in(tmp_path) == {"pytorch_model.bin"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/folder cannot be written: Not a directory\."):
        write(tmp_path / "file/folder", {"a": np.zeros(2)})


def test_a_full_disk_is_named_and_leaves_no_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"{tmp_path} cannot be written: File too large"):
            write(
                tmp_path, {"a": np.zeros(2), "b": np.zeros(1_000_000, np.int8)}, max_shard_bytes=1
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not files_in(tmp_path)


# ---- JSON


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON: it is not a text file in UTF-8"),
        (gzip.compress(b"{}", mtime=0), "not JSON: it is not a text file in UTF-8"),
        (b"[]", "JSON list"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"config.json .*{reason}"):
        read_json(tmp_path / "config.json")


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"é": [1, None]}


# ---- memory


MB = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def grown_bytes(folder: Path, release: bool) -> int:
    """Largest increase of resident memory while all tensors are read one after another."""
    before, most = resident_bytes(), 0
    with open_tensors(folder) as stored:
        for tensor in stored.values():
            assert tensor.read().sum() == 0
            most = max(most, resident_bytes() - before)
            if release:
                tensor.release()
    return most


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    arrays = {f"{i:02}": np.zeros((4 * MB + 1000 * i) // 4, np.float32) for i in range(50)}
    before = resident_bytes()
    if kind == "bin":
        save_torch(tmp_path, {name: torch.from_numpy(array) for name, array in arrays.items()}, ZIP)
    else:
        write(tmp_path, arrays)
        assert resident_bytes() - before < 20 * MB
    del arrays
    assert grown_bytes(tmp_path, release=True) < 20 * MB
    assert grown_bytes(tmp_path, release=False) > 180 * MB  # the measure sees mapped pages


@both_formats
def test_a_released_tensor_reads_the_same(tmp_path, as_zip):
    base = torch.arange(30_000.0).reshape(3, -1)
    tensors = {"base": base, "transposed": base.T[5:], "empty": base[3:], "last": torch.ones(())}
    save_torch(tmp_path, tensors, as_zip)
    stored = open_tensors(tmp_path)
    held = {name: tensor.read() for name, tensor in stored.items()}
    for tensor in stored.values():
        tensor.release()
    assert_same(stored, tensors)
    for name, array in held.items():
        np.testing.assert_array_equal(array, tensors[name].numpy())
