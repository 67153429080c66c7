"""A job on a GKE cluster, with a fake `xpk`."""

import shlex


def test_a_cluster_sees_the_bucket_and_a_second_time_it_is_not_attached_again(cloud):
    cloud.do("xpk/create", "xpk/create")
    assert "--tpu-type=v5litepod-16" in cloud.calls("cluster", "create")[0]
    attached = cloud.calls("storage", "attach")
    assert (
        len(attached) == 1
        and f"--mount-point={cloud.folder}/mount" in attached[0]
        and "our-bucket" in attached[0]
    )


def test_reserved_capacity_is_refused(cloud):
    cloud.settings(CAPACITY="reserved")
    done = cloud.run("xpk/create")
    assert done.returncode == 2 and "choose spot or on-demand" in done.stderr and not cloud.calls()


def test_launching_twice_starts_one_job_that_kubernetes_resumes(cloud):
    cloud.do("xpk/launch")
    assert "first: running already" in cloud.do("xpk/launch")
    (job,) = cloud.calls("workload", "create")
    assert {"--workload=first", "--restart-on-exit-codes=75", "--max-restarts=1000"} <= set(job)
    command = next(word for word in job if word.startswith("--command=")).partition("=")[2]
    options = f"--config configs/easy_vqa/unified.py --workdir {cloud.folder}/mount/runs/first"
    assert shlex.split(command) == shlex.split(
        f"exec bash experiments/tpu/worker.sh container {options}"
    )


def test_following_shows_the_first_machine_or_all(cloud):
    assert "workload=first,batch.kubernetes.io/job-completion-index=0" in cloud.do("xpk/follow")
    assert cloud.do("xpk/follow --all").endswith("workload=first\n")


def test_a_dry_run_of_following_prints_both_commands_and_calls_none(cloud):
    listed, logs = map(shlex.split, cloud.do("xpk/follow --dry-run").splitlines())
    assert not cloud.calls()
    cloud.do("xpk/follow")
    assert cloud.calls("workload", "list") == [listed]
    assert logs[:3] == ["kubectl", "logs", "--follow"]
    assert (
        logs[-1]
        == "--selector=xpk.google.com/workload=first,batch.kubernetes.io/job-completion-index=0"
    )


def test_deleting_a_job_and_deleting_none(cloud):
    cloud.do("xpk/launch", "xpk/delete")
    assert "job first does not exist" in cloud.do("xpk/delete")
    assert len(cloud.calls("workload", "delete")) == 1 and not cloud.calls("cluster", "delete")
    cloud.do("xpk/delete --cluster")
    assert len(cloud.calls("cluster", "delete")) == 1


def test_a_dry_run_prints_the_commands_that_a_run_calls_and_calls_none(cloud):
    scripts = ("xpk/create", "xpk/launch", "xpk/delete --cluster")
    printed = [
        [
            words
            for line in cloud.do(f"{script} --dry-run").splitlines()
            if (words := shlex.split(line))[0] == "xpk"
        ]
        for script in scripts
    ]
    assert not cloud.calls()
    for script, commands in zip(scripts, printed):
        before = len(cloud.calls())
        cloud.do(script)
        assert cloud.calls()[before:] == commands, script
