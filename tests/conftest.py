"""Settings that must precede the import of JAX: eight CPU devices, checked shape annotations."""

import contextlib
import functools
import gc
import os
import signal
from pathlib import Path

from tests.xla_flags import QUICK_COMPILATION

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    *QUICK_COMPILATION,
    # Eight devices on two busy cores may wait for each other longer than the default 40 s.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

COMPILATION_CACHE = Path("~/.cache/vlm_jax/tests").expanduser()
MAX_CACHE_BYTES = 2 * 2**30
LONGEST = (
    "tests/runtime/test_distributed",
    "tests/train/test_loop.py",
    "tests/train/test_memory.py",
    "tests/train/test_survival.py",
    "tests/study/test_running.py",
    "tests/test_extending.py",
    "tests/test_learning.py",
)
# `structs` is not checked: tree functions put leaves of any kind into them.
CHECKED = ["vlm_jax.nn", "vlm_jax.train.loss", "vlm_jax.infer.generate"]
CHECKED_IN = ("tests/nn/", "tests/train/test_loss.py", "tests/infer/test_generate.py")
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

from vlm_jax import axes  # noqa: E402


def pytest_configure(config):
    """Empties a compilation cache that is too large, except in pytest-xdist's workers."""
    is_worker = hasattr(config, "workerinput")
    if is_worker or not COMPILATION_CACHE.is_dir():
        return
    files = list(COMPILATION_CACHE.iterdir())
    # Another session may empty it at the same time.
    with contextlib.suppress(FileNotFoundError):
        if sum(file.stat().st_size for file in files) > MAX_CACHE_BYTES:
            for file in files:
                file.unlink(missing_ok=True)


def pytest_collection_modifyitems(items):
    """Puts the longest files first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish():
    """Collects garbage less often: tracing makes many objects, and the imports' are never free."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory) -> str:
    """Folder in which the tests of this process prepare datasets, each once."""
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Keeps compiled programs between test runs: most of the suite's time is compilation.

    The key of a program holds its HLO, the compiler's flags and the version of jaxlib.
    """
    jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Drops compiled programs after each module.

    A program holds memory maps, of which Linux allows a process 65,530: XLA would crash.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """Meshes of this module have one device: its programs compile and run faster than on eight."""
    make_mesh = axes.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axes, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module", autouse=True)
def shape_checks(request):
    """Checks shape annotations in `CHECKED_IN` alone: checks take an eighth of tracing."""
    is_checked = request.node.nodeid.startswith(CHECKED_IN)
    jaxtyping.config.update("jaxtyping_disable", not is_checked)


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    """A command run in this process leaves SIGTERM ignored: the next test must not inherit that."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
