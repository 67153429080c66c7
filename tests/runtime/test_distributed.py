"""Two processes compute what one computes, and either continues what the other began."""

import json
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.runtime.processes import begin, ended, experiment, fields, free_address, pair
from vlm_jax.config import Eval, Source, Train, files
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import write_conversations
from vlm_jax.train import loop


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, datasets_dir, arguments):
    """The run of one process with eight devices: its config."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    given = dict(zip(*[iter(map(str, arguments(workdir)))] * 2))
    cfg = experiment()
    cfg = replace(
        cfg,
        workdir=str(workdir),
        data=replace(cfg.data, dir=datasets_dir),
        train=replace(cfg.train, compilation_cache_dir=given["--train.compilation_cache_dir"]),
    )
    loop.train(cfg)
    return cfg


def logged(workdir):
    return [json.loads(line) for line in Workdir(str(workdir)).metrics.read_text().splitlines()]


def assert_alike(found, expected):
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, 7))
    for row, other in zip(found, expected):
        for name in ("loss", "grad_norm", "learning_rate", "padding_fraction"):
            np.testing.assert_allclose(
                row[name], other[name], rtol=1e-4, err_msg=f"{name} of step {row['step']}"
            )


def forget_step_6(workdir, to):
    """A copy of a run as it was after step 4."""
    shutil.copytree(workdir, to)
    shutil.rmtree(Workdir(str(to)).checkpoints / "6")
    return to


def test_two_processes_train_what_one_trains(one_process, arguments, tmp_path):
    """Logs and results are written once, by the first process; the second prints nothing."""
    workdir = tmp_path / "two"
    (code, out, err), (second_code, second_out, second_err) = pair(arguments(workdir))
    assert (code, second_code) == (0, 0), err + second_err
    assert "step 6/6" in out
    assert not second_out
    assert_alike(logged(workdir), logged(one_process.workdir))
    assert json.loads(Workdir(str(workdir)).eval.read_text())["examples"] == 12
    stored = Workdir(str(workdir)).read_config()
    assert stored == replace(one_process, workdir=str(workdir)), (
        "the config does not depend on the number of processes"
    )


SIGNALED = """
import os, signal, sys
from vlm_jax.cli.main import main
from vlm_jax.train import loop
from vlm_jax.train.checkpoint import Checkpoints

log_step, save, mine = loop.log_step, Checkpoints.save, int(sys.argv[1])

def log_then_signal(run, pending):
    loss = log_step(run, pending)
    if (pending.step, mine) == (1, 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return loss

def signal_and_save(self, step, *rest):
    for _ in range(2 if step == 3 else 0):
        os.kill(os.getpid(), signal.SIGTERM)
    save(self, step, *rest)

loop.log_step, Checkpoints.save = log_then_signal, signal_and_save
raise SystemExit(main(sys.argv[2:]))
"""


def stopped_pair(arguments):
    """Two processes: the second alone gets SIGTERM, then both get it while they save."""
    address = free_address()
    running = [begin(["-c", SIGNALED, i, *arguments, *fields(address, i)]) for i in range(2)]
    for code, _, err in map(ended, running):
        assert (code, err) == (
            75,
            "stopped by SIGTERM after step 3, which is saved: the same command continues it.\n",
        )


def saved_steps(workdir):
    return sorted(
        int(path.name)
        for path in Workdir(str(workdir)).checkpoints.iterdir()
        if path.name.isdecimal()
    )


def test_sigterm_of_one_process_stops_both_after_one_step_and_one_goes_on(
    one_process, arguments, tmp_path
):
    cfg = replace(one_process, workdir=str(tmp_path / "stopped"))
    stopped_pair(arguments(cfg.workdir))
    assert saved_steps(cfg.workdir) == [2, 3]
    loop.train(cfg)
    assert_alike(logged(cfg.workdir), logged(one_process.workdir))


SAME = ("step", "loss", "grad_norm", "learning_rate", "padding_fraction", "image_padding_fraction")


@pytest.fixture
def write_config(tmp_path, arguments):
    """`write_config(cfg)(workdir)`: arguments of a run of an experiment."""

    def write(cfg):
        config = tmp_path / "run.py"
        config.write_text(
            "from vlm_jax.config import files\n"
            f"def get_config(): return files.from_json({files.to_json(cfg)!r}, 'config')\n"
        )
        cache = arguments("")[arguments("").index("--train.compilation_cache_dir") + 1]
        given = ["--config", config, "--train.compilation_cache_dir", cache]
        return lambda workdir: [*given, "--workdir", workdir]

    return write


@pytest.fixture
def talks(tmp_path, write_config):
    """`talks(workdir)`: arguments of a run on packed conversations, validated every 3 steps."""
    splits = {"splits": ("val=train[:5]",), "during_examples": 4, "max_new_tokens": 2}
    return write_config(
        replace(
            experiment(),
            data=write_conversations(tmp_path / "talks"),
            eval=Eval(split="", every_steps=3, **splits),
        )
    )


def steps(workdir):
    return [row for row in logged(workdir) if "loss" in row]


def exact(workdir):
    return [[row[name] for name in SAME] for row in steps(workdir)]


def validations(workdir):
    scores = [row for row in logged(workdir) if "loss" not in row]
    return [[row[name] for name in ("step", "val/loss", "val/exact_match")] for row in scores]


@pytest.mark.slow
def test_two_processes_that_were_stopped_go_on_as_if_never_stopped_and_so_does_one(talks, tmp_path):
    """Packed conversations: the packer is part of the data state.

    A validation is due at step 3, in which they are stopped.
    """
    whole, stopped, alone = (tmp_path / name for name in ("whole", "stopped", "alone"))
    assert [code for code, _, _ in pair(talks(whole))] == [0, 0]
    stopped_pair(talks(stopped))
    shutil.copytree(stopped, alone)
    (code, out, err), (second_code, _, _) = pair(talks(stopped))
    assert (code, second_code) == (0, 0), err
    assert "continuing from step 3" in out
    assert exact(stopped) == exact(whole)
    assert validations(stopped) == validations(whole)
    assert [row[0] for row in validations(whole)] == [3, 6]
    code, out, err = ended(begin(["run.py", *talks(alone)], devices=8))
    assert code == 0, err
    assert "continuing from step 3" in out
    assert_alike(steps(alone), steps(whole))
    np.testing.assert_allclose(validations(alone), validations(whole), rtol=1e-4)


def mixture(folder):
    """The data of three sources of conversations with a template each."""
    sources = []
    for seed, template in enumerate(("plain", "vicuna", "caption")):
        data = write_conversations(folder / template, 40 + seed, seed)
        own = {"files": data.files, "image_dir": data.image_dir, "template": template}
        sources.append(Source(f"{template}_talks", weight=1.0 + seed, **own))
    return replace(data, files=(), image_dir="", mixture=tuple(sources))


# Ends of fields that depend on the time.
TIMES = ("_seconds", "_per_second", "mfu")


@pytest.mark.slow
def test_a_mixture_that_was_killed_goes_on_in_one_process_with_the_same_metrics(
    write_config, tmp_path
):
    """Bit for bit: two devices hold the same rows in one process and in two, and sum two numbers.

    A row is the mean over three steps, and a checkpoint is in the middle of a row.
    """
    splits = {"splits": ("val=train[:5]",), "during_examples": 4, "max_new_tokens": 2}
    run = write_config(
        replace(
            experiment(),
            data=mixture(tmp_path),
            train=Train(steps=20, batch_size=8, log_every_steps=3, checkpoint_every_steps=2),
            eval=Eval(split="", every_steps=10, **splits),
        )
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def begin_pair(workdir):
        address = free_address()
        return [begin(["run.py", *run(workdir), *fields(address, i)], devices=1) for i in range(2)]

    for code, _, err in map(ended, begin_pair(whole)):
        assert code == 0, err
    running = begin_pair(killed)
    for line in running[0].stdout:
        if line.startswith("step 6/"):
            break
    for process in running:
        process.kill()
    assert [ended(process)[0] for process in running] == [-signal.SIGKILL] * 2
    code, out, err = ended(begin(["run.py", *run(killed)], devices=2))
    assert code == 0, err
    assert "continuing from step" in out

    def metrics(workdir):
        rows = logged(workdir)
        return [{key: x for key, x in row.items() if not key.endswith(TIMES)} for row in rows]

    assert metrics(killed) == metrics(whole)
    row = metrics(whole)[-2]
    for name in ("plain_talks", "vicuna_talks", "caption_talks"):
        assert {f"loss/{name}", f"token_share/{name}"} <= row.keys()
        assert f"val/loss/{name}" in metrics(whole)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_process_is_killed_the_other_ends_and_both_go_on(killed, talks, tmp_path):
    """Soon after `distributed.heartbeat_seconds`, by an error of gloo or of JAX."""
    workdir, address = tmp_path / "run", free_address()
    running = [
        begin(["run.py", *talks(workdir), *fields(address, i, heartbeat_seconds=10)])
        for i in range(2)
    ]
    for line in running[0].stdout:
        if line.startswith("step 3/"):
            break
    running[killed].kill()
    since = time.monotonic()
    code, _, err = ended(running[1 - killed])
    assert time.monotonic() - since < 30
    assert code not in (0, 75), "not `resume me`, which is for the killed process"
    assert (
        "another process ended" in err
        or "another task died" in err
        or "could not be written" in err
    ), err
    ended(running[killed])
    assert saved_steps(workdir)[0] == 2
    (code, out, err), _ = pair(talks(workdir))
    assert code == 0, err
    assert "continuing from step" in out
    assert [row["step"] for row in steps(workdir)] == list(range(1, 7))


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(one_process, arguments, tmp_path):
    workdir = forget_step_6(one_process.workdir, tmp_path / "continued")
    (code, out, err), _ = pair(arguments(workdir), ["--mesh.fsdp", "2"], ["--mesh.fsdp", "2"])
    assert code == 0, err
    assert "continuing from step 4" in out
    assert_alike(logged(workdir), logged(one_process.workdir))


SHARES = """
import sys
from dataclasses import replace
from vlm_jax import axes, sharding
from vlm_jax.config import ConfigError, Distributed, Mesh, UserError
from vlm_jax.runtime import distributed
from vlm_jax.testing import tiny

distributed.start(replace(tiny(), distributed=Distributed(sys.argv[1], 2, int(sys.argv[2]), 300)))
for sizes in ((8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)):
    print(*sharding.share_of_rows(axes.make_mesh(Mesh(*sizes))), file=sys.stderr)
print("printed")
for refused in (ConfigError, OSError):
    try:
        with distributed.raise_on_all():
            if sys.argv[2] == "1":
                raise refused("no disk here.")
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
"""


def test_each_process_knows_its_share_of_the_rows_and_what_the_other_refuses():
    """Processes that tensor spans hold the same rows: one share."""
    address = free_address()
    running = [begin(["-c", SHARES, address, i]) for i in range(2)]
    (_, out, err), (_, second_out, second_err) = map(ended, running)
    assert err.splitlines() == ["0 2", "0 2", "0 2", "0 1", *["process 1: no disk here."] * 2]
    assert second_err.splitlines() == ["1 2", "1 2", "1 2", "0 1", *["no disk here."] * 2]
    assert (out, second_out) == ("printed\n", "")
