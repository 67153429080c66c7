"""Laws of every script: shellcheck, --help, named missing settings, and a truthful dry run."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "experiments" / "tpu"
SLICE = ("create", "setup", "launch", "follow", "resume", "delete")
CLUSTER = ("xpk/create", "xpk/launch", "xpk/follow", "xpk/delete")


def test_shellcheck_finds_nothing():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "pip install -r requirements-dev.txt"
    scripts = sorted(map(str, TPU.rglob("*.sh")))
    assert len(scripts) == len(SLICE) + len(CLUSTER) + 4  # common, slice, cluster, worker
    done = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SLICE + CLUSTER)
def test_help_needs_no_settings_and_does_nothing(cloud, script):
    cloud.job.unlink()
    assert cloud.do(f"{script} --help").startswith(
        f"usage: bash experiments/tpu/{script}.sh [--job FILE]"
    )
    assert not cloud.calls()


@pytest.mark.parametrize("script", SLICE + CLUSTER)
def test_an_option_or_a_job_that_is_none(cloud, script):
    done = cloud.run(script, "--dryrun")
    assert (
        done.returncode == 2
        and "--dryrun is not an option of this script: choose --job FILE, --dry-run" in done.stderr
    )
    cloud.job.unlink()
    done = cloud.run(script)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--job {cloud.job} is not a file" in done.stderr
    assert not cloud.calls()


@pytest.mark.parametrize(
    "setting", ["PROJECT", "ZONE", "BUCKET", "NAME", "CONFIG", "ACCELERATOR_TYPE", "VERSION"]
)
def test_a_setting_that_is_missing_is_named(cloud, setting):
    cloud.settings(**{setting: ""})
    done = cloud.run("resume")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {setting} is empty: set it in {cloud.job}.\n",
    )
    assert not cloud.calls()


@pytest.mark.parametrize("script", CLUSTER)
def test_a_cluster_has_a_name(cloud, script):
    cloud.settings(CLUSTER="")
    assert cloud.run(script).stderr == f"error: CLUSTER is empty: set it in {cloud.job}.\n"


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("BUCKET", "gs://our-bucket", "without gs://"),
        ("NAME", "My_Run", "lower-case letters, digits and -"),
        ("CAPACITY", "cheap", "choose spot, on-demand or reserved"),
        ("CONFIG", "configs/none.py", "is not a file in"),
        ("MOUNT", "mnt/bucket", "starts with /"),
        ("ARGUMENTS", "--mesh.fsdp 16", "write a list with an option and its value apart"),
    ],
)
def test_a_setting_that_cannot_be(cloud, setting, value, message):
    cloud.settings(**{setting: value})
    done = cloud.run("create")
    assert done.returncode == 2 and f"{setting}={value}" in done.stderr and message in done.stderr
    assert not cloud.calls()


@pytest.mark.parametrize(
    "line", ["ARGUMENTS=--mesh.fsdp 16", "ARGUMENTS=(--mesh.fsdp 16", "ZONE=$NONE"]
)
def test_a_job_that_the_shell_cannot_read(cloud, line):
    """Even with more lines after it, here all the settings."""
    cloud.job.write_text(f"{line}\n{cloud.job.read_text()}")
    done = cloud.run("resume")
    assert done.returncode == 2 and f"error: --job {cloud.job} cannot be read" in done.stderr
    assert not cloud.calls()


def test_arguments_left_empty_are_none(cloud):
    none = cloud.do("launch --dry-run")
    cloud.settings(MOUNT=str(cloud.folder / "mount"), ARGUMENTS="")
    assert cloud.do("launch --dry-run") == none


@pytest.mark.parametrize("script", SLICE + CLUSTER)
def test_a_command_that_is_not_installed_is_named_and_a_dry_run_needs_none(cloud, script):
    system = cloud.folder / "system"
    system.mkdir()
    for tool in ("bash", "date", "dirname", "git", "grep", "mktemp", "rm", "sed"):
        (system / tool).symlink_to(shutil.which(tool))
    cloud.path = str(system)
    done = cloud.run(script)
    command, how = (
        ("xpk", "pip install")
        if script in CLUSTER
        else ("gcloud", "see cloud.google.com/sdk/docs/install")
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"error: {command} is not installed: {how}" in done.stderr
    assert command in cloud.do(f"{script} --dry-run")


def words(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines()]


def test_a_dry_run_prints_the_commands_that_a_run_calls_and_calls_none(cloud):
    """Create, set up, launch, follow, delete."""
    cloud.settings(
        MOUNT=str(cloud.folder / "mount"), SERVICE_ACCOUNT="us@our-project.iam.gserviceaccount.com"
    )
    cloud.write("ahead", "ACTIVE")
    cloud.write("outcomes", "long")
    job = ("create", "setup", "launch", "follow", "delete")
    printed = [words(cloud.do(f"{script} --dry-run")) for script in job]
    assert not cloud.calls()
    for script, commands in zip(job, printed):
        before = len(cloud.calls())
        if script == "follow":  # lasts as long as the training
            cloud.start(script)
            cloud.until(lambda: len(cloud.calls()) > before)  # noqa: B023
        else:
            cloud.do(script)
        called = cloud.calls()[before:]
        assert called == [command for command in commands if command[0] == "gcloud"], script


@pytest.mark.parametrize(
    "capacity, flags", [("spot", ["--spot"]), ("on-demand", []), ("reserved", ["--reserved"])]
)
def test_a_slice_is_asked_for_as_the_job_says(cloud, capacity, flags):
    cloud.settings(CAPACITY=capacity)
    create = [command for command in words(cloud.do("create --dry-run")) if "create" in command]
    assert create == [
        [
            *(
                "gcloud",
                "compute",
                "tpus",
                "queued-resources",
                "create",
                "first",
                "--node-id=first",
            ),
            *("--project=our-project", "--zone=us-west4-a", "--accelerator-type=v5litepod-16"),
            *(
                "--runtime-version=v2-alpha-tpuv5-lite",
                "--scopes=https://www.googleapis.com/auth/cloud-platform",
            ),
            *flags,
        ]
    ]


def test_arguments_with_spaces_and_quotes_arrive_as_they_are(cloud):
    odd, equal = "it's a 'b' $HOME; #", "--run.note=a b"
    cloud.write("outcomes", "0")
    cloud.job.write_text(
        cloud.job.read_text() + f"ARGUMENTS=({shlex.quote(equal)} --data.dir {shlex.quote(odd)})\n"
    )
    cloud.do("create", "setup", "launch")
    cloud.until(lambda: len(cloud.starts()) == 2)
    assert all(start.endswith(f"{equal} --data.dir {odd}") for start in cloud.starts())


def test_a_dry_run_of_resume_shows_every_step(cloud):
    output = cloud.do("resume --then-delete --dry-run")
    order = [
        "queued-resources create",
        "is fresh",
        "worker.sh install",
        "is idle",
        "worker.sh start",
        "is resume",
    ]
    order += [
        "worker.sh stop",
        "worker.sh start",
        "is failed",
        "worker.sh report",
        "queued-resources delete",
    ]
    positions = [output.index(order[0])]
    for step in order[1:]:
        positions.append(output.index(step, positions[-1] + 1))
    assert not cloud.calls()
