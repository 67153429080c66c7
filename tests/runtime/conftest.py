"""Command lines of runs of two processes."""

import jax
import pytest

from tests.runtime.processes import CONFIG


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, datasets_dir):
    """`arguments(workdir)` of a run of the experiment."""
    config = tmp_path_factory.mktemp("config") / "small.py"
    config.write_text(CONFIG)
    cache = jax.config.jax_compilation_cache_dir  # kept between runs of the tests
    common = [
        "--config",
        config,
        "--data.dir",
        datasets_dir,
        "--train.compilation_cache_dir",
        cache,
    ]
    return lambda workdir: [*common, "--workdir", workdir]
