"""Tensors in a file of `torch.save` are those that torch wrote, and a damaged file is refused."""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from tests.hub.tensors.tensor_files import (
    LEGACY_START,
    TORCH_DTYPES,
    ZIP,
    assert_same,
    both_formats,
    of_every_dtype,
    refusal,
    save_torch,
)
from vlm_jax.config import UserError
from vlm_jax.hub.tensors.folder import open_tensors


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
        fits = (
            math.prod(shape) == 0 or start + sum((n - 1) * s for n, s in zip(shape, strides)) < 20
        )
        seen[fits] += 1
        save_torch(tmp_path, {"a": Rebuilt(storage, start, tuple(shape), tuple(strides))}, as_zip)
        if fits:
            assert_same(
                open_tensors(tmp_path), {"a": torch.arange(20.0).as_strided(shape, strides, start)}
            )
        else:
            assert "beyond its storage" in refusal(tmp_path)
    assert min(seen.values()) > 20


@both_formats
def test_parameters_and_state_dicts_with_metadata_are_read(tmp_path, as_zip):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    save_torch(tmp_path, model.state_dict(keep_vars=True), as_zip)
    assert any(
        isinstance(value, torch.nn.Parameter) for value in model.state_dict(keep_vars=True).values()
    )
    assert_same(open_tensors(tmp_path), model.state_dict())


@both_formats
def test_the_state_dict_in_a_training_checkpoint_is_read(tmp_path, as_zip):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 1,
        "name": "run",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
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
        except UserError:
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
    zipped(
        path, {name: content for name, content in entries.items() if not name.endswith("data/0")}
    )
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


NO_TENSORS = {
    "empty": {},
    "numbers": {"a": 1},
    "no dict": [1, 2],
    "empty state dict": {"state_dict": {}},
}


@both_formats
@pytest.mark.parametrize("saved", NO_TENSORS.values(), ids=NO_TENSORS)
def test_a_torch_file_without_tensors_is_refused(tmp_path, saved, as_zip):
    save_torch(tmp_path, saved, as_zip)
    assert "has no tensors" in refusal(tmp_path)


def test_a_big_endian_legacy_file_is_refused(tmp_path):
    pickles = [*LEGACY_START[:2], {"little_endian": False}, {}, []]
    (tmp_path / "pytorch_model.bin").write_bytes(
        b"".join(pickle.dumps(value, protocol=2) for value in pickles)
    )
    assert "big-endian" in refusal(tmp_path)
