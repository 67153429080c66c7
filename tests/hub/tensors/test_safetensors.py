"""Tensors in a safetensors file are those that safetensors wrote, and a file that lies is refused."""

import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from tests.hub.tensors.tensor_files import (
    OTHER_DTYPES,
    TORCH_DTYPES,
    assert_same,
    entry,
    of_every_dtype,
    refusal,
    save_raw,
    write,
)
from vlm_jax.hub.tensors.folder import open_tensors, write_tensors


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
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.array(7),
        "c": np.zeros((0, 2), np.float16),
    }
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
        {
            "a": entry(0, 1, (1,), "U8"),
            "b": entry(1, 9, (2,), "F32"),
            "c": entry(9, 13, (2,), "BF16"),
        },
        b"\x07"
        + np.array([1, 2], np.float32).tobytes()
        + np.array([3, 4], ml_dtypes.bfloat16).tobytes(),
    )
    stored = open_tensors(tmp_path)
    assert [stored[name].read().astype(np.float64).tolist() for name in "abc"] == [
        [7],
        [1, 2],
        [3, 4],
    ]


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
    "fewer than 8 bytes": (b"\x10\0", "truncated"),
    "header beyond the file": (struct.pack("<Q", 100) + b"{}", "header would end at byte 108"),
    "the longest header": (b"\xff" * 16, "header would end"),
    "no header": (b"\0" * 16, "not JSON"),
    "text": (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
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
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
        "a has no dtype",
    ),
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
    "impossible shape of no bytes": (
        {"a": entry(0, 0, (0, 2**70)), "b": entry(0, 8)},
        "impossible shape",
    ),
    "too many axes": ({"a": entry(0, 8, (2,) + (1,) * 70)}, "impossible shape"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, "b starts at byte 4"),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, "b starts at byte 0"),
    "a hole": ({"a": entry(0, 4, (1,)), "b": entry(8, 12, (1,))}, "b starts at byte 8"),
    "a hole at the start": ({"a": entry(4, 8, (1,))}, "a starts at byte 4"),
    "bytes left over": ({"a": entry(0, 4, (1,))}, "continues after its last tensor"),
    "beyond the file": ({"a": entry(0, 16, (4,))}, "is truncated"),
    "far beyond the file": ({"a": entry(0, 2**62, (2**60,))}, "is truncated"),
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
