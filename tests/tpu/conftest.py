"""A cloud in a folder: fake `gcloud` and `xpk` first in PATH, and two machines with fake tools."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.limits import LIMIT_SECONDS

HERE = Path(__file__).parent
TPU = HERE.parents[1] / "experiments" / "tpu"
TOOLS = ("curl", "sudo", "mountpoint", "gcsfuse", "fusermount", "lsb_release", "kubectl")
SETTINGS = {
    "PROJECT": "our-project",
    "ZONE": "us-west4-a",
    "BUCKET": "our-bucket",
    "NAME": "first",
    "CLUSTER": "ours",
}
# Left out of the archive of the code: no machine reads them, and gzip takes 0.3 s for them.
UNUSED_FILES = ("/.github", "/docs", "/experiments/results", "/tests", "/vlm_jax")


class Cloud:
    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "xpk"):
            self._executable(
                name, f'#!/bin/sh\nexec "{sys.executable}" -IS "{HERE}/fake_{name}.py" "$@"\n'
            )
        for name in ("tool", *TOOLS):
            self._executable(name, (HERE / "stubs" / "tool").read_text())
        self.write("fake_python.py", (HERE / "fake_python.py").read_text(), self.bin)
        self.path = f"{self.bin}:{os.environ['PATH']}"
        self.write("ahead", "")
        self.write("attributes", "".join(f"{path} export-ignore\n" for path in UNUSED_FILES))
        self.settings(MOUNT=str(folder / "mount"))

    def _executable(self, name: str, text: str) -> None:
        self.write(name, text, self.bin).chmod(0o755)

    def write(self, name: str, text: str, folder: Path | None = None) -> Path:
        path = (folder or self.folder) / name
        path.write_text(text)
        return path

    def settings(self, **changed: str) -> None:
        """Writes the job file: the repository's, filled in."""
        self.job = self.folder / "job.env"
        lines = (TPU / "job.env").read_text() + "\n"
        lines += "".join(
            f"{name}={shlex.quote(value)}\n" for name, value in {**SETTINGS, **changed}.items()
        )
        self.job.write_text(lines)

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": self.path,
            "CLOUD": str(self.folder),
            "TEST_PYTHON": sys.executable,
            "TMPDIR": str(self.folder),
            "POLL_SECONDS": "0.05",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "core.attributesFile",
            "GIT_CONFIG_VALUE_0": str(self.folder / "attributes"),
        }

    def start(self, script: str, *options: str) -> subprocess.Popen:
        command = ["bash", str(TPU / f"{script}.sh"), "--job", str(self.job), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment(), **pipes)

    def run(self, script: str, *options: str) -> subprocess.CompletedProcess:
        process = self.start(script, *options)
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def do(self, *scripts: str) -> str:
        """Runs scripts that must succeed; returns the output of the last."""
        for script in scripts:
            done = self.run(*script.split())
            assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def calls(self, *words: str) -> list[list[str]]:
        """Returns the calls so far that contain all the words."""
        file = self.folder / "calls"
        called = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        return [call for call in called if set(words) <= set(call)]

    def starts(self) -> list[str]:
        file = self.folder / "starts"
        return file.read_text().splitlines() if file.exists() else []

    def until(self, condition) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "the condition did not become true"
            time.sleep(0.05)

    def end_trainings(self) -> None:
        for group in self.folder.glob("machines/*/job/group"):
            subprocess.run(
                ["kill", "-KILL", "--", f"-{group.read_text().strip()}"], stderr=subprocess.DEVNULL
            )


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end_trainings()


@pytest.fixture(scope="module")
def cloud_of_module(tmp_path_factory):
    """For tests that leave it as it was."""
    cloud = Cloud(tmp_path_factory.mktemp("cloud"))
    yield cloud
    cloud.end_trainings()
