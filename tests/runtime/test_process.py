"""Memory that a process returns to the system."""

import subprocess
import sys
import textwrap

import pytest

HOLDS_AND_GIVES_BACK = textwrap.dedent(
    """
    from vlm_jax.runtime.process import trim_memory

    def resident_bytes():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    pieces = [bytearray(2000) for _ in range(100_000)]
    kept, held = pieces[-1], resident_bytes()
    del pieces
    trim_memory()
    print(held - resident_bytes())
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_goes_back_to_the_system():
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_AND_GIVES_BACK], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 150e6
