"""A job from creation to its end on a fake TPU of two machines; commands can be repeated."""

import signal
import subprocess

import pytest

from tests.limits import LIMIT_SECONDS


def on_machines(cloud, word: str) -> set[str]:
    output = set()
    for home in (cloud.folder / "machines").iterdir():
        command = ["bash", "vlm_jax/experiments/tpu/worker.sh", word]
        environment = {**cloud.environment(), "HOME": str(home)}
        output.add(
            subprocess.run(
                command, cwd=home, env=environment, capture_output=True, text=True
            ).stdout.strip()
        )
    return output


def status(cloud) -> set[str]:
    return on_machines(cloud, "status")


def running(cloud) -> None:
    cloud.write("outcomes", "long")
    cloud.do("create", "setup", "launch")
    cloud.until(lambda: len(cloud.starts()) == 2)
    assert status(cloud) == {"training: running"}


@pytest.fixture(scope="module")
def running_cloud(cloud_of_module):
    """A training runs in it, before and after each test."""
    running(cloud_of_module)
    return cloud_of_module


@pytest.fixture
def still_running(running_cloud):
    yield running_cloud
    assert len(running_cloud.starts()) == 2
    assert status(running_cloud) == {"training: running"}


def test_creating_waits_and_a_second_time_does_nothing(cloud):
    cloud.write("ahead", "WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    output = cloud.do("create")
    assert [line.split(": ")[1] for line in output.splitlines()] == [
        *("NOT_FOUND", "WAITING_FOR_RESOURCES", "PROVISIONING", "ready")
    ]
    cloud.do("create")
    assert len(cloud.calls("create")) == 1


def test_a_slice_that_was_taken_away_is_asked_for_again(cloud):
    for state in ("SUSPENDED", "FAILED"):
        cloud.write("request", state)
        cloud.do("create")
    cloud.write("node", "PREEMPTED")  # the request is ACTIVE still
    cloud.do("create")
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 3


def test_a_request_that_google_refuses_is_an_error_with_the_reason(cloud):
    cloud.write("ahead", "FAILED")
    done = cloud.run("create")
    assert done.returncode == 1 and "could not grant first" in done.stderr
    assert "--format=yaml(state)" in cloud.calls()[-1] and len(cloud.calls("create")) == 1


def test_an_error_is_not_taken_for_absence(cloud):
    cloud.write("error", "PERMISSION_DENIED: TPU API has not been used")
    for script in ("create", "setup", "resume", "delete"):
        done = cloud.run(script)
        assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr
    assert not cloud.calls("create") and not cloud.calls("delete")


def test_launching_twice_starts_one_training(still_running):
    cloud = still_running
    output = cloud.do("launch")
    assert output.count("is already running") == 2
    workdir = f"--config configs/easy_vqa/unified.py --workdir {cloud.folder}/mount/runs/first"
    assert sorted(cloud.starts()) == [f"{machine} tpu,cpu {workdir}" for machine in "01"]
    mounts = (cloud.folder / "mounts").read_text().splitlines()
    assert len(mounts) == 1 and mounts[0].endswith(f"our-bucket {cloud.folder}/mount")


def test_the_machines_install_what_the_repository_says(running_cloud):
    installed = (running_cloud.folder / "installed").read_text().splitlines()
    assert len(installed) == 2
    assert all(line.endswith("/vlm_jax/requirements.txt jax[tpu]") for line in installed)


def test_code_is_not_replaced_under_a_training(still_running):
    done = still_running.run("setup")
    assert done.returncode == 2 and "the training of first runs" in done.stderr


def test_code_is_not_replaced_where_the_machines_cannot_be_asked(still_running):
    cloud = still_running
    uploads = len(cloud.calls("storage", "cp"))
    cloud.write("outage", "1")
    done = cloud.run("setup")
    assert (
        done.returncode == 1 and done.stderr == "ERROR: (gcloud) Could not reach metadata service\n"
    )
    assert len(cloud.calls("storage", "cp")) == uploads


def test_watching_again_takes_up_a_job_that_runs(still_running):
    before = len(still_running.calls("ssh"))
    process = still_running.start("resume")
    still_running.until(lambda: len(still_running.calls("ssh")) > before + 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT_SECONDS)


def refuses(cloud, script: str, machines: int, message: str) -> None:
    """With one sentence for each machine, and exit code 2."""
    done = cloud.run(*script.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", machines)
    assert done.stderr.count(message) == machines


COMMANDS_OF_MACHINES = {"launch": 2, "follow": 1, "follow --all": 2}


def refuse_all(cloud) -> None:
    for script, machines in COMMANDS_OF_MACHINES.items():
        refuses(cloud, script, machines, " is not set up: run setup.sh first.\n")


def test_machines_that_are_not_set_up_say_so(cloud):
    """Without setup.sh, after a failed installation, and after a failure without the old code."""
    cloud.do("create")
    refuse_all(cloud)
    system = (cloud.bin / "sudo").read_text()
    cloud.write("sudo", "#!/bin/sh\nexit 1\n", cloud.bin)
    assert cloud.run("setup").returncode == 1
    refuse_all(cloud)
    cloud.write("sudo", system, cloud.bin)
    cloud.do("setup")
    # Set up, but not launched.
    for script in ("follow", "follow --all"):
        refuses(cloud, script, COMMANDS_OF_MACHINES[script], ": run launch.sh first.\n")
    cloud.write("tar", "#!/bin/sh\nexit 1\n", cloud.bin).chmod(0o755)
    assert cloud.run("setup").returncode == 1
    refuse_all(cloud)


def test_following_ends_with_the_training(cloud):
    running(cloud)
    process = cloud.start("follow", "--all")
    cloud.until(
        lambda: any("worker.sh follow --names" in call[-1] for call in cloud.calls("--worker=all"))
    )
    for group in (cloud.folder / "machines").glob("*/job/group"):
        subprocess.run(["kill", "-TERM", "--", f"-{group.read_text().strip()}"], check=True)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    # Each line follows the name of its machine.
    assert process.returncode == 0 and output.count(": step 1") == 2


def test_deleting_lets_the_training_save_and_a_second_time_does_nothing(cloud):
    running(cloud)
    homes = cloud.folder / "machines"
    cloud.do("delete")
    assert [(homes / machine / "job" / "exit_code").read_text() for machine in "01"] == [
        "75\n",
        "75\n",
    ]
    assert not (cloud.folder / "request").exists()
    assert "TPU first does not exist" in cloud.do("delete")
    assert len(cloud.calls("delete")) == 1


def test_a_job_is_brought_to_its_end_through_a_preemption_and_a_restart(cloud):
    """The TPU is preempted, then SIGTERM stops the training, then one machine restarts."""
    cloud.write("outcomes", "gone 75 long 0")
    process = cloud.start("resume", "--then-delete")
    cloud.until(lambda: len(cloud.starts()) == 6)
    cloud.until(lambda: status(cloud) == {"training: running"})
    group = (cloud.folder / "machines" / "1" / "job" / "group").read_text().strip()
    subprocess.run(["kill", "-KILL", "--", f"-{group}"], check=True)
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output + errors
    assert len(cloud.calls("create")) == 2 and len(cloud.calls("delete")) == 2
    # All starts have the same work folder.
    assert len(cloud.starts()) == 8 and len({start[2:] for start in cloud.starts()}) == 1
    uploads = [call for call in cloud.calls("storage", "cp") if call[-1].startswith("gs://")]
    # A preempted job continues with the code that it started with.
    assert len(uploads) == 1
    assert "training done" in output and not (cloud.folder / "request").exists()


def test_what_is_mended_is_set_up_and_runs(cloud):
    """After a failure on the same slice; a new job does not use the code of a deleted one."""
    cloud.write("outcomes", "1 0 0")
    assert cloud.run("resume").returncode == 1
    cloud.do("setup", "resume")
    assert len(cloud.starts()) == 4
    code = cloud.folder / "buckets" / "our-bucket" / "code" / "first.tar.gz"
    assert code.exists()
    cloud.do("delete")
    assert not code.exists()


def test_a_training_that_fails_stops_the_job_and_shows_why(cloud):
    cloud.write("outcomes", "1")
    done = cloud.run("resume")
    assert done.returncode == 1
    assert done.stdout.count("error: this is why") == 2 and done.stdout.count("exit code 1") == 2
    assert (
        "the TPU still exists and costs money: bash experiments/tpu/delete.sh --job" in done.stdout
    )
    assert len(cloud.starts()) == 2 and not cloud.calls("delete")


def test_machines_that_fail_for_want_of_one_that_was_told_to_stop_are_resumed(cloud):
    """Exit code 75 of one machine outweighs the others' aborts."""
    cloud.write("outcomes", "75 0")
    cloud.do("create", "setup", "launch")
    job = cloud.folder / "machines" / "1" / "job"
    cloud.until(lambda: (job / "exit_code").exists())
    (job / "exit_code").write_text("134\n")
    assert cloud.run("resume").returncode == 0
    assert len(cloud.starts()) == 4


def test_a_step_that_keeps_failing_stops_the_job(cloud):
    cloud.write("sudo", "#!/bin/sh\necho no disk left >&2; exit 100\n", cloud.bin)
    done = cloud.run("resume")
    assert (
        done.returncode == 1
        and "setup.sh failed, time 3 of 3" in done.stdout
        and "no disk left" in done.stderr
    )
    assert len(cloud.calls("create")) == 1 and not cloud.starts()


def test_an_error_is_shown_at_once_and_nothing_waits_after_the_last(cloud):
    cloud.write("sleep", "#!/bin/sh\necho slept >&2\n", cloud.bin).chmod(0o755)
    cloud.write("error", "PERMISSION_DENIED")
    error = "ERROR: (gcloud) PERMISSION_DENIED"
    assert cloud.run("create").stderr.splitlines() == [error]
    five_attempts = [error, "slept"] * 4 + [error]
    assert cloud.run("resume").stderr.splitlines() == [
        *five_attempts,
        *five_attempts,
        "slept",
        *five_attempts,
    ]


def test_watching_survives_outages(cloud):
    """Two outages, each shorter than three polls whose attempts all fail, together longer."""
    cloud.write("outcomes", "long 0")
    process = cloud.start("resume")
    cloud.until(lambda: len(cloud.starts()) == 2)
    for _ in range(2):
        cloud.write("outage", "12")
        cloud.until(lambda: (cloud.folder / "outage").read_text() == "0")
        before = len(cloud.calls())
        cloud.until(lambda: len(cloud.calls()) > before + 6)  # noqa: B023
    group = (cloud.folder / "machines" / "1" / "job" / "group").read_text().strip()
    subprocess.run(["kill", "-TERM", "--", f"-{group}"], check=True)
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output + errors
    assert output.count("asking Google Cloud failed, time 2 of 3") == 2 and len(cloud.starts()) == 4


@pytest.mark.parametrize("calls", [1000, 15])
def test_an_outage_of_three_looks_stops_the_watching(cloud, calls):
    """Each poll has five attempts; if the outage is over then, the TPU can be deleted."""
    cloud.write("outcomes", "long")
    process = cloud.start("resume", "--then-delete")
    cloud.until(lambda: len(cloud.starts()) == 2)
    cloud.write("outage", str(calls))
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1, output + errors
    assert (
        "asking Google Cloud failed, time 3 of 3" in output
        and "start it again to continue the job" in output
    )
    left = calls > 15
    assert (
        (cloud.folder / "request").exists()
        == ("the TPU still exists and costs money" in output)
        == left
    )


def test_a_tpu_that_the_user_deletes_is_not_created_again(cloud):
    cloud.write("outcomes", "long")
    process = cloud.start("resume")
    cloud.until(lambda: len(cloud.starts()) == 2)
    cloud.do("delete")
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1 and "was deleted; its run" in errors
    assert len(cloud.calls("create")) == 1


def test_what_is_stopped_to_be_deleted_is_started_by_nobody_until_it_is_set_up(cloud):
    running(cloud)
    on_machines(cloud, "end")
    assert status(cloud) == {"training: ending"}
    done = cloud.run("launch")
    assert done.returncode and done.stderr.count("is being deleted") == 2
    assert len(cloud.starts()) == 2
    cloud.write("outcomes", "0 0")
    cloud.do("setup", "launch")
    cloud.until(lambda: len(cloud.starts()) == 4)


def test_a_request_that_the_user_deletes_is_not_made_again(cloud):
    for script in ("create", "resume"):
        cloud.write("request", "WAITING_FOR_RESOURCES")
        before = len(cloud.calls())
        process = cloud.start(script)
        cloud.until(lambda: len(cloud.calls()) > before + 2)  # noqa: B023
        cloud.do("delete")
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode and "first was deleted" in errors
    assert not cloud.calls("create")


def test_a_request_that_google_refuses_three_times_stops_the_job(cloud):
    cloud.write("ahead", " ".join(["FAILED"] * 20))
    done = cloud.run("resume")
    assert done.returncode == 1 and "create.sh failed, time 3 of 3" in done.stdout
    assert len(cloud.calls("create")) == 3
