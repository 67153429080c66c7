"""Settled before anything imports JAX: eight CPU devices, and shape annotations that are checked at every call."""

import os
import signal
from pathlib import Path

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # most of the suite's time is compilation: this halves it
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

COMPILATION_CACHE = Path("~/.cache/vlm_jax/tests").expanduser()
COMPILATION_CACHE_BYTES = 4 * 2**30
CHECKED = [
    "vlm_jax.nn",
    "vlm_jax.train.loss",
    "vlm_jax.infer.generate",
]  # never `structs`: trees of anything
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory) -> str:
    """Where this run of the tests prepares its datasets, once."""
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Keeps compiled programs between test runs: most of the suite's time is compilation.

    The key of a program holds its HLO, the compiler's flags and the version of jaxlib.
    """
    jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
    jax.config.update("jax_compilation_cache_max_size", COMPILATION_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module", autouse=True)
def programs_let_go():
    """A program holds memory maps, and Linux allows a process 65,530: with those of all modules XLA would crash."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def signal_handlers_restored():
    """A command run in this process leaves SIGTERM ignored: the next test must not inherit that."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
