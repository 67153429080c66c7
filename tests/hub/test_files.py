"""Tensors in a folder are the tensors that torch, safetensors and transformers wrote there, and the other way round."""

import io
import json
import math
import mmap
import os
import pickle
import resource
import struct
import subprocess
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from vlm_jax.config import ConfigError
from vlm_jax.hub import files
from vlm_jax.hub.files import open_tensors, read_json, write_tensors

ZIP, LEGACY = True, False
both_formats = pytest.mark.parametrize("as_zip", [ZIP, LEGACY], ids=["zip", "legacy"])

TORCH_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
OTHER_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


def of_every_dtype(dtypes) -> dict[str, torch.Tensor]:
    """Tensors of all dtypes and of 0, 1 and 3 axes; one without elements; names that JSON has to escape."""
    tensors = {f"{dtype}.ones": torch.arange(-30, 30).reshape(3, 4, 5).to(dtype) for dtype in dtypes}
    tensors |= {f"{dtype}.odd": torch.arange(7).to(dtype) for dtype in dtypes}
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), 'é "\\/\n': torch.tensor([True])}


def bits(tensor) -> np.ndarray:
    """The bytes of a tensor of torch or NumPy, so that all dtypes compare exactly."""
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)


def assert_same(stored, tensors: dict):
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        array = stored[name].read()
        assert (array.shape, array.dtype) == (stored[name].shape, stored[name].dtype), name
        assert array.shape == tuple(tensor.shape), name
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(bits(array), bits(tensor), err_msg=name)


def save_torch(folder: Path, saved, as_zip: bool, name: str = "pytorch_model.bin"):
    torch.save(saved, folder / name, _use_new_zipfile_serialization=as_zip)


def write(folder: Path, arrays: dict, **options):
    write_tensors(folder, arrays, arrays.__getitem__, **options)


def save_raw(folder: Path, header, data: bytes):
    """A safetensors file with any header: an object, or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refusal(folder: Path) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises(ConfigError) as error:
        open_tensors(folder)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    return str(error.value)


# ---- safetensors


def test_what_safetensors_wrote_is_read(tmp_path):
    tensors = of_every_dtype(TORCH_DTYPES + OTHER_DTYPES)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(open_tensors(tmp_path), tensors)


def test_what_is_written_is_byte_for_byte_what_safetensors_writes(tmp_path):
    tensors = of_every_dtype(TORCH_DTYPES + OTHER_DTYPES)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    safetensors.torch.save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    with open_tensors(theirs) as stored:
        write_tensors(ours, stored, lambda name: stored[name].read())
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_what_is_written_is_read_by_safetensors_for_numpy_and_torch(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array(7), "c": np.zeros((0, 2), np.float16)}
    write(tmp_path, arrays)
    for name, array in safetensors.numpy.load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
    for name, tensor in safetensors.torch.load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name], strict=True)


def test_a_spec_may_be_of_jax(tmp_path):
    arrays = {"a": jax.numpy.arange(5, dtype=jax.numpy.bfloat16)}
    write_tensors(tmp_path, jax.eval_shape(lambda: arrays), lambda name: np.asarray(arrays[name]))
    assert_same(open_tensors(tmp_path), {"a": torch.arange(5, dtype=torch.bfloat16)})


def test_tensors_at_odd_bytes_are_read(tmp_path):
    """The format's own writer aligns them, others do not."""
    save_raw(
        tmp_path,
        {"a": entry(0, 1, (1,), "U8"), "b": entry(1, 9, (2,), "F32"), "c": entry(9, 13, (2,), "BF16")},
        b"\x07" + np.array([1, 2], np.float32).tobytes() + np.array([3, 4], ml_dtypes.bfloat16).tobytes(),
    )
    stored = open_tensors(tmp_path)
    assert [stored[name].read().astype(np.float64).tolist() for name in "abc"] == [[7], [1, 2], [3, 4]]


def test_a_tensor_is_a_view_of_the_file_that_cannot_be_written(tmp_path):
    write(tmp_path, {"a": np.ones(3)})
    with open_tensors(tmp_path) as stored:
        array = stored["a"].read()
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2


def test_a_view_outlives_its_context_and_a_stored_tensor_does_not(tmp_path):
    write(tmp_path, {"a": np.ones(3)})
    with open_tensors(tmp_path) as held:
        array = held["a"].read()
    np.testing.assert_array_equal(array, np.ones(3))
    with open_tensors(tmp_path) as closed:
        pass
    with pytest.raises(ValueError, match="closed"):
        closed["a"].read()


# ---- what hostile or damaged safetensors files say

DAMAGED = {
    "empty file": (b"", "is empty"),
    "fewer than 8 bytes": (b"\x10\0", "cut short"),
    "header beyond the file": (struct.pack("<Q", 100) + b"{}", "header would end at byte 108"),
    "the longest header": (b"\xff" * 16, "header would end"),
    "no header": (b"\0" * 16, "not JSON"),
    "text": (b"<!DOCTYPE html><html></html>", "no safetensors file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, reason):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert f"{tmp_path / 'model.safetensors'} " in refusal(tmp_path)
    assert reason in refusal(tmp_path)


LIES = {
    "not JSON": (b"{no}", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not JSON"),
    "nested too deep": (b"[" * 100_000, "not JSON"),
    "a list": ([], "is a JSON list"),
    "entry is no object": ({"a": 3}, "a has no dtype"),
    "entry is text": ({"a": "F32"}, "a has no dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "a has no dtype"),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "a has no dtype"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, "a has no dtype"),
    "unknown dtype": ({"a": entry(0, 8, dtype="F33")}, "a has the dtype F33"),
    "dtype is a list": ({"a": entry(0, 8, dtype=["F32"])}, "a has no dtype"),
    "negative offset": ({"a": entry(-8, 0)}, "a of shape"),
    "backward": ({"a": entry(8, 0)}, "a of shape"),
    "fraction": ({"a": entry(0, 8.0)}, "a of shape"),
    "true as a size": ({"a": entry(0, 4, (True,))}, "a of shape"),
    "negative size": ({"a": entry(0, 8, (-1, -2))}, "a of shape"),
    "size is text": ({"a": entry(0, 8, "2")}, "a of shape"),
    "shape larger than its bytes": ({"a": entry(0, 8, (3,))}, "a of shape"),
    "shape smaller than its bytes": ({"a": entry(0, 8, (1,))}, "a of shape"),
    "product past 64 bits": ({"a": entry(0, 8, (2**62, 8))}, "a of shape"),
    "impossible shape of no bytes": ({"a": entry(0, 0, (0, 2**70)), "b": entry(0, 8)}, "impossible shape"),
    "too many axes": ({"a": entry(0, 8, (2,) + (1,) * 70)}, "impossible shape"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, "b begins at byte 4"),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, "b begins at byte 0"),
    "a hole": ({"a": entry(0, 4, (1,)), "b": entry(8, 12, (1,))}, "b begins at byte 8"),
    "a hole at the start": ({"a": entry(4, 8, (1,))}, "a begins at byte 4"),
    "bytes left over": ({"a": entry(0, 4, (1,))}, "goes on after its last tensor"),
    "beyond the file": ({"a": entry(0, 16, (4,))}, "is cut short"),
    "far beyond the file": ({"a": entry(0, 2**62, (2**60,))}, "is cut short"),
}


@pytest.mark.parametrize(("header", "reason"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(tmp_path, header, reason):
    save_raw(tmp_path, header, bytes(8))
    assert str(tmp_path / "model.safetensors") in refusal(tmp_path)
    assert reason in refusal(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write(tmp_path / "whole", {"a": np.ones(3, np.float32), "b": np.ones((), np.int8)})
    whole = (tmp_path / "whole/model.safetensors").read_bytes()
    for length in range(1, len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        refusal(tmp_path)


# ---- torch


@both_formats
def test_what_torch_wrote_is_read(tmp_path, as_zip):
    tensors = of_every_dtype(TORCH_DTYPES)
    save_torch(tmp_path, tensors, as_zip)
    assert_same(open_tensors(tmp_path), tensors)


@both_formats
def test_views_of_a_storage_are_read(tmp_path, as_zip):
    base = torch.arange(48.0).reshape(6, 8)
    tensors = {
        "base": base,
        "row": base[3],
        "column": base[:, 5],
        "transposed": base.T,
        "steps": base[1::2, ::3],
        "broadcast": base[2, 3].expand(4, 5),
        "permuted": torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4).permute(2, 0, 1),
        "nothing": base[6:],
    }
    save_torch(tmp_path, tensors, as_zip)
    stored = open_tensors(tmp_path)
    assert_same(stored, tensors)
    assert np.shares_memory(stored["base"].read(), stored["transposed"].read())


@both_formats
def test_any_strides_inside_a_storage_are_read_and_none_beyond_it(tmp_path, as_zip):
    rng, seen = np.random.default_rng(0), {True: 0, False: 0}
    storage = torch.arange(20.0)._typed_storage()
    for _ in range(150):
        shape, strides = rng.integers(0, 4, 2).tolist(), rng.integers(0, 9, 2).tolist()
        start = int(rng.integers(0, 20))
        fits = math.prod(shape) == 0 or start + sum((n - 1) * s for n, s in zip(shape, strides)) < 20
        seen[fits] += 1
        save_torch(tmp_path, {"a": Rebuilt(storage, start, tuple(shape), tuple(strides))}, as_zip)
        if fits:
            assert_same(open_tensors(tmp_path), {"a": torch.arange(20.0).as_strided(shape, strides, start)})
        else:
            assert "beyond its storage" in refusal(tmp_path)
    assert min(seen.values()) > 20


@both_formats
def test_parameters_and_state_dicts_with_metadata_are_read(tmp_path, as_zip):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    save_torch(tmp_path, model.state_dict(keep_vars=True), as_zip)
    assert any(isinstance(value, torch.nn.Parameter) for value in model.state_dict(keep_vars=True).values())
    assert_same(open_tensors(tmp_path), model.state_dict())


@both_formats
def test_the_state_dict_in_a_training_checkpoint_is_read(tmp_path, as_zip):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    checkpoint = {"epoch": 1, "name": "run", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_torch(tmp_path, checkpoint, as_zip)
    assert_same(open_tensors(tmp_path), model.state_dict())


def test_a_storage_of_a_zip_is_mapped_where_torch_says_it_lies(tmp_path):
    tensors = {str(i): torch.full((i * 37 + 1,), i) for i in range(20)}
    save_torch(tmp_path, tensors, ZIP)
    records = torch._C.PyTorchFileReader(str(tmp_path / "pytorch_model.bin"))
    stored = open_tensors(tmp_path)
    assert [stored[str(i)].offset_bytes for i in range(20)] == [
        records.get_record_offset(f"data/{i}") for i in range(20)
    ]


class Rebuilt:
    """Is pickled as a view of a storage, with any numbers."""

    def __init__(self, *view):
        self.view = view

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (*self.view, False, OrderedDict())


FLOATS = torch.arange(4.0)._typed_storage()
IMPOSSIBLE = {
    "beyond the storage": (FLOATS, 0, (5,), (1,)),
    "start beyond the storage": (FLOATS, 4, (1,), (1,)),
    "stride beyond the storage": (FLOATS, 0, (2,), (4,)),
    "negative start": (FLOATS, -1, (1,), (1,)),
    "negative size": (FLOATS, 0, (-1,), (1,)),
    "negative stride": (FLOATS, 3, (4,), (-1,)),
    "more sizes than strides": (FLOATS, 0, (2, 2), (1,)),
    "more strides than sizes": (FLOATS, 0, (2,), (1, 1)),
    "sizes past 64 bits": (FLOATS, 0, (2**70,), (0,)),
    "a size is text": (FLOATS, 0, ("2",), (1,)),
    "a size is a fraction": (FLOATS, 0, (2.0,), (1,)),
    "no storage": (None, 0, (1,), (1,)),
    "no shape": (FLOATS, 0, None, None),
}


@both_formats
@pytest.mark.parametrize("view", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_view_is_refused(tmp_path, view, as_zip):
    save_torch(tmp_path, {"a": Rebuilt(*view)}, as_zip)
    assert str(tmp_path / "pytorch_model.bin") in refusal(tmp_path)


# ---- code in pickles


class Call:
    """Is pickled as a call of a function, made when the pickle is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


LEGACY_START = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]  # what the first pickles of such a file hold


CALLS = {
    "open": (open, "{}", "w"),
    "system": (os.system, "touch {}"),
    "eval": (eval, "open('{}', 'w')"),
    "exec": (exec, "open('{}', 'w')"),
    "Popen": (subprocess.Popen, ["touch", "{}"]),
    "load": (torch.load, "{}"),
    "getattr": (getattr, "a", "upper"),
    "SimpleNamespace": (types.SimpleNamespace,),
}


@both_formats
@pytest.mark.parametrize("place", ["alone", "in a state dict", "as a name", "in a checkpoint"])
@pytest.mark.parametrize("name", CALLS)
def test_a_pickle_that_calls_a_function_is_refused_and_not_run(tmp_path, name, place, as_zip):
    function, *arguments = CALLS[name]
    target = str(tmp_path / "ran")
    call = Call(function, *(eval(repr(argument).replace("{}", target)) for argument in arguments))
    saved = {
        "alone": call,
        "in a state dict": {"a": torch.ones(2), "b": call},
        "as a name": {call: torch.ones(2)},
        "in a checkpoint": {"state_dict": {"a": torch.ones(2)}, "args": call},
    }
    save_torch(tmp_path, saved[place], as_zip)
    said = refusal(tmp_path)
    assert said.startswith(str(tmp_path / "pytorch_model.bin"))
    assert "is refused: it wants to run " in said and f".{name}'; only tensors are read." in said
    assert not os.path.exists(target)


@pytest.mark.parametrize("position", range(5))
def test_every_pickle_of_a_legacy_file_is_guarded(tmp_path, position):
    pickles = [*LEGACY_START, {}, []]
    pickles[position] = Call(os.system, f"touch {tmp_path / 'ran'}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"".join(pickle.dumps(value, protocol=2) for value in pickles))
    assert "posix.system" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


TRICKS = {  # opcodes that reach for names or objects in other ways than a call of a class
    "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
    "old instance": b"(S'touch ran'\nios\nsystem\n.",
    "module of a module": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
    "code object": b"\x80\x02ctypes\nCodeType\n.",
    "extension registry": b"\x80\x02\x82\x01.",
    "a gigabyte in ten bytes": b"\x80\x02}r\xff\xff\xff\x03.",
}


@pytest.mark.parametrize("content", TRICKS.values(), ids=TRICKS)
def test_tricks_of_opcodes_are_refused(tmp_path, content):
    most_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert str(tmp_path / "pytorch_model.bin") in refusal(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most_kb < 100_000


@pytest.mark.parametrize("target", [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
                                    b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"])  # fmt: skip
def test_a_pickle_cannot_change_what_reads_it(tmp_path, target):
    """BUILD with (None, {name: value}) sets attributes of whatever find_class gave."""
    poison = b"\x80\x02" + target + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b."
    (tmp_path / "pytorch_model.bin").write_bytes(poison)
    assert "Error" in refusal(tmp_path)
    save_torch(tmp_path, {"a": torch.ones(2)}, ZIP)
    assert_same(open_tensors(tmp_path), {"a": torch.ones(2)})


# ---- damaged files of torch


def zipped(path: Path, entries: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@both_formats
def test_a_torch_file_cut_anywhere_is_refused(tmp_path, as_zip):
    path = tmp_path / "pytorch_model.bin"
    save_torch(tmp_path, {"a": torch.arange(9.0), "b": torch.ones(3, dtype=torch.int8)}, as_zip)
    whole = path.read_bytes()
    for length in range(len(whole) - 1, 0, -5):
        path.write_bytes(whole[:length])
        assert str(path) in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_file_with_wrong_bytes_is_read_or_refused(tmp_path, kind):
    rng, refused = np.random.default_rng(0), 0
    tensors = {"a": torch.arange(9.0), "b": torch.ones(3, 2, dtype=torch.int8)}
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    else:
        save_torch(tmp_path, tensors, as_zip=kind == "zip")
    (path,) = tmp_path.iterdir()
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(damaged.tobytes())
        try:
            for tensor in open_tensors(tmp_path).values():
                tensor.read().sum()
                tensor.release()
        except ConfigError:
            refused += 1
    assert refused > 50


def test_a_rewritten_zip_is_read_and_a_compressed_or_incomplete_one_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    save_torch(tmp_path, {"a": torch.arange(9.0)}, ZIP)
    entries = entries_of(path)
    root = next(iter(entries)).split("/")[0]
    zipped(path, entries)
    assert_same(open_tensors(tmp_path), {"a": torch.arange(9.0)})
    zipped(path, entries, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(tmp_path)
    zipped(path, {name: content for name, content in entries.items() if not name.endswith("data/0")})
    assert "KeyError('0')" in refusal(tmp_path)
    zipped(path, entries | {f"{root}/data/0": bytes(8)})
    assert "beyond its storage" in refusal(tmp_path)
    zipped(path, entries | {f"{root}/byteorder": b"big"})
    assert "big-endian" in refusal(tmp_path)
    zipped(path, {"a/b": b""})
    assert str(path) in refusal(tmp_path)


def test_a_zip_entry_past_4_gb_is_found(tmp_path):
    """Its place is in the zip64 fields; the file is sparse and takes no disk."""
    path = tmp_path / "pytorch_model.bin"
    save_torch(tmp_path, {"a": torch.arange(9.0), "b": torch.arange(5)}, ZIP)
    entries, far = entries_of(path), 2**32 + 2**20
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            if name.endswith("data/1"):
                archive.fp.truncate(far)
                archive.fp.seek(far)
                archive.start_dir = far
            archive.writestr(name, content)
    assert path.stat().st_size > far
    stored = open_tensors(tmp_path)
    assert stored["b"].offset_bytes > far
    assert_same(stored, {"a": torch.arange(9.0), "b": torch.arange(5)})


@pytest.mark.parametrize(
    ("saved_id", "is_read"),
    [
        (("storage", torch.FloatStorage, "0", "cpu", 4, None), True),
        (("storage", torch.FloatStorage, "0", "cpu", 4, ("1", 2, 2)), False),
        (("module", torch.FloatStorage, "0", "cpu", 4, None), False),
        (("storage", "OddStorage", "0", "cpu", 4, None), False),
    ],
    ids=["whole storage", "part of a storage", "a module", "unknown type"],
)
def test_a_legacy_file_names_whole_storages(tmp_path, saved_id, is_read):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return saved_id if value is FLOATS else None

    buffer = io.BytesIO()
    for value in (*LEGACY_START, {"a": Rebuilt(FLOATS, 0, (4,), (1,))}, ["0"]):
        Pickler(buffer, protocol=2).dump(value)
    data = struct.pack("<q4f", 4, 0, 1, 2, 3)
    (tmp_path / "pytorch_model.bin").write_bytes(buffer.getvalue() + data)
    if is_read:
        assert_same(open_tensors(tmp_path), {"a": torch.arange(4.0)})
    else:
        assert "damaged" in refusal(tmp_path)


NO_TENSORS = {"empty": {}, "numbers": {"a": 1}, "no dict": [1, 2], "empty state dict": {"state_dict": {}}}


@both_formats
@pytest.mark.parametrize("saved", NO_TENSORS.values(), ids=NO_TENSORS)
def test_a_torch_file_without_tensors_is_refused(tmp_path, saved, as_zip):
    save_torch(tmp_path, saved, as_zip)
    assert "holds no tensors" in refusal(tmp_path)


def test_a_big_endian_legacy_file_is_refused(tmp_path):
    pickles = [*LEGACY_START[:2], {"little_endian": False}, {}, []]
    (tmp_path / "pytorch_model.bin").write_bytes(b"".join(pickle.dumps(value, protocol=2) for value in pickles))
    assert "big-endian" in refusal(tmp_path)


# ---- folders


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
    assert f"{tmp_path / 'none'} is no folder" in refusal(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "is no folder" in refusal(tmp_path / "file")
    assert all(name in refusal(tmp_path) for name in (str(tmp_path), *files.READABLE, files.INDEX))


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))


def test_the_shards_of_transformers_are_read(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tied = {"lm_head.weight"}  # the same tensor as the embedding, so it is not saved
    assert_same(open_tensors(tmp_path), {name: t for name, t in gpt2.state_dict().items() if name not in tied})


def test_shards_of_torch_files_are_read(tmp_path):
    shards = {
        "pytorch_model-1.bin": {"a": torch.ones(2), "b": torch.ones(3)},
        "pytorch_model-2.bin": {"c": torch.ones(())},
    }
    for name, tensors in shards.items():
        save_torch(tmp_path, tensors, ZIP, name)
    index = {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(open_tensors(tmp_path), {name: t for tensors in shards.values() for name, t in tensors.items()})


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
    arrays = {name: np.zeros(size, np.int8) for name, size in {"a": 8, "b": 8, "c": 32, "d": 4}.items()}
    write(tmp_path, arrays, max_shard_bytes=max_shard_bytes)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(safetensors.numpy.load_file(path)) for path in paths] == shards
    if len(shards) > 1:
        n = len(shards)
        assert [path.name for path in paths] == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        index = read_json(tmp_path / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == 52
        assert index["weight_map"] == {name: path.name for path, names in zip(paths, shards) for name in names}


@pytest.fixture
def sharded(tmp_path) -> Path:
    write(tmp_path, {"a": np.ones(4), "b": np.ones(4)}, max_shard_bytes=1)
    return tmp_path


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model.safetensors.index.json names files that are not there: model-00002-of-00002" in refusal(sharded)


def test_a_shard_that_lacks_a_tensor_is_named(sharded):
    other = sharded / "other"
    write(other, {"c": np.ones(4)})
    (other / "model.safetensors").rename(sharded / "model-00002-of-00002.safetensors")
    said = refusal(sharded)
    assert "index.json says that b is in model-00002-of-00002.safetensors, which does not hold it" in said


def test_a_shard_that_is_cut_short_is_named(sharded):
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is cut short" in refusal(sharded)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../a"}}, {"weight_map": {"a": "/a"}}],
)
def test_an_index_without_a_map_to_files_beside_it_is_refused(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json has no weight_map" in refusal(sharded)


# ---- writing


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_tensor_at_a_time_is_asked_for(tmp_path):
    arrays, asked = {name: np.zeros(3) for name in "dbca"}, []
    write_tensors(tmp_path, arrays, lambda name: asked.append(name) or arrays[name], max_shard_bytes=48)
    assert asked == ["b", "d", "a", "c"]  # two shards, each in the order of its file


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 1])
def test_an_error_in_the_middle_leaves_no_file(tmp_path, error, max_shard_bytes):
    def read(name):
        if name == "c":
            assert files_in(tmp_path)
            assert all(name.endswith(".tmp") for name in files_in(tmp_path))
            raise error
        return np.zeros(3)

    with pytest.raises(error):
        write_tensors(tmp_path, {name: np.zeros(3) for name in "abcd"}, read, max_shard_bytes)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros((3, 1)), np.zeros(3, np.float32)])
def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="a was to be float64"):
        write_tensors(tmp_path, {"a": np.zeros(3)}, lambda name: wrong)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype(">f4"), np.dtype("U3")])
def test_a_dtype_that_safetensors_does_not_know_is_refused(tmp_path, dtype):
    with pytest.raises(ConfigError, match="a is .*safetensors knows"):
        write(tmp_path / "new", {"a": np.zeros(3, dtype)})
    assert not files_in(tmp_path)


def test_weights_that_are_there_are_not_overwritten(tmp_path):
    save_torch(tmp_path, {"a": torch.ones(2)}, ZIP)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is there already"):
        write(tmp_path, {"a": np.zeros(2)})
    assert files_in(tmp_path) == {"pytorch_model.bin"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/folder cannot be written: Not a directory\."):
        write(tmp_path / "file/folder", {"a": np.zeros(2)})


def test_a_full_disk_is_named_and_leaves_no_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written: File too large"):
            write(tmp_path, {"a": np.zeros(2), "b": np.zeros(1_000_000, np.int8)}, max_shard_bytes=1)
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
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[]", "JSON list"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"config.json .*{reason}"):
        read_json(tmp_path / "config.json")


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"é": [1, None]}


# ---- memory


MB = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def grown_bytes(folder: Path, release: bool) -> int:
    """How much more memory is resident at the most while all tensors are read one after another."""
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
