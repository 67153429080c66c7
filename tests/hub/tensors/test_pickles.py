"""A pickle that wants to run code is refused, and none of it runs."""

import os
import pickle
import resource
import subprocess
import types

import pytest
import torch

from tests.hub.tensors.tensor_files import (
    LEGACY_START,
    ZIP,
    assert_same,
    both_formats,
    refusal,
    save_torch,
)
from vlm_jax.hub.tensors.folder import open_tensors


class Call:
    """Is pickled as a call of a function, made when the pickle is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


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
    assert "unsafe pickle" in said and f".{name}'; only tensors are loaded." in said
    assert not os.path.exists(target)


@pytest.mark.parametrize("position", range(5))
def test_every_pickle_of_a_legacy_file_is_guarded(tmp_path, position):
    pickles = [*LEGACY_START, {}, []]
    pickles[position] = Call(os.system, f"touch {tmp_path / 'ran'}")
    (tmp_path / "pytorch_model.bin").write_bytes(
        b"".join(pickle.dumps(value, protocol=2) for value in pickles)
    )
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
