"""Helpers of the tests of tensor files."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_jax.config import UserError
from vlm_jax.hub.tensors.folder import open_tensors, write_tensors

ZIP, LEGACY = True, False
LEGACY_START = [
    0x1950A86A20F9469CFC6C,
    1001,
    {"little_endian": True},
]  # what the first pickles of such a file hold
both_formats = pytest.mark.parametrize("as_zip", [ZIP, LEGACY], ids=["zip", "legacy"])

TORCH_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
OTHER_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


def of_every_dtype(dtypes) -> dict[str, torch.Tensor]:
    """Tensors of all dtypes and of 0, 1 and 3 axes, an empty one, and names that JSON escapes."""
    tensors = {
        f"{dtype}.ones": torch.arange(-30, 30).reshape(3, 4, 5).to(dtype) for dtype in dtypes
    }
    tensors |= {f"{dtype}.odd": torch.arange(7).to(dtype) for dtype in dtypes}
    return tensors | {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        'é "\\/\n': torch.tensor([True]),
    }


def bits(tensor) -> np.ndarray:
    """The bytes of a tensor of torch or NumPy, so that all dtypes compare exactly."""
    if isinstance(tensor, torch.Tensor):
        return (
            tensor.detach()
            .clone(memory_format=torch.contiguous_format)
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
        )
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
    with pytest.raises(UserError) as error:
        open_tensors(folder)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    return str(error.value)
