"""The installed package: its version, its command, its files, and an import that costs nothing."""

import importlib
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import vlm_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def ended(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_version_has_one_owner():
    assert "version" in PROJECT["project"]["dynamic"]
    module, name = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"].rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) == vlm_jax.__version__


def test_the_import_loads_no_numerical_library():
    libraries = {"jax", "flax", "numpy", "PIL", "tokenizers"}
    code = f"import sys, vlm_jax; print(sorted({libraries} & set(sys.modules)))"
    assert ended("-c", code).stdout == "[]\n"


def test_a_run_imports_what_it_may_not_need_later():
    """The log, the samples, the studies and the command line import these when they use them."""
    libraries = {"tensorboard", "matplotlib", "scipy", "tyro", "sklearn", "pandas"}
    modules = "vlm_jax.cli.main, vlm_jax.cli.train, vlm_jax.train.loop"
    code = f"import sys, {modules}; print(sorted({libraries} & set(sys.modules)))"
    assert ended("-c", code).stdout == "[]\n"


def test_the_command_restarts_as_it_was_started():
    config = "configs/easy_vqa/unified.py"
    done = ended(
        "-X", "utf8", "-m", "vlm_jax", "diff", config, config
    )  # without GLIBC_TUNABLES it starts again
    assert (done.returncode, done.stdout, done.stderr) == (0, "the two configs are equal\n", "")


def test_the_console_script_is_the_command_line():
    module, name = PROJECT["project"]["scripts"]["vlm-jax"].split(":")
    assert module == "vlm_jax.__main__"
    assert callable(getattr(importlib.import_module(module), name))


def test_every_file_of_the_package_is_in_the_wheel():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "vlm_jax").rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        package = path.parent
        assert (package / "__init__.py").is_file(), path
        name = ".".join(package.relative_to(ROOT).parts)
        assert path.suffix == ".py" or any(
            fnmatch(path.name, pattern) for pattern in data.get(name, [])
        ), path
