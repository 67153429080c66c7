"""A run that is stopped by a signal, a full disk or a crash of the machine loses nothing."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.limits import LIMIT_SECONDS
from vlm_jax import axes
from vlm_jax.cli import train
from vlm_jax.cli.main import main
from vlm_jax.config import Mesh, UserError, files
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.runtime import preemption
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import variants_and_tiles
from vlm_jax.train import loop
from vlm_jax.train.checkpoint import Checkpoints, SaveError
from vlm_jax.train.step import abstract_state

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[2]
SAME = ("step", "loss", "grad_norm", "learning_rate", "padding_fraction")


@pytest.fixture
def experiment(short_run, tmp_path):
    """`experiment(workdir, kind, **train)`: 6 steps, saved after every third."""

    def make(workdir="run", kind="unified", **train):
        return short_run(
            kind, tmp_path / workdir, **{"steps": 6, "checkpoint_every_steps": 3, **train}
        )

    return make


@pytest.fixture
def file_size():
    """`file_size(bytes)` limits file sizes, as a full disk does; `file_size()` lifts the limit."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=before):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

    yield limit
    limit()


def rows(cfg):
    lines = Workdir(cfg.workdir).metrics.read_text().splitlines()
    return [[json.loads(line)[key] for key in SAME] for line in lines]


def saved_steps(cfg):
    return sorted(
        int(path.name)
        for path in Workdir(cfg.workdir).checkpoints.iterdir()
        if path.name.isdecimal()
    )


def last_state(cfg):
    checkpoints = Checkpoints(Workdir(cfg.workdir).checkpoints, cfg.train)
    restored = checkpoints.restore(abstract_state(cfg, axes.make_mesh(Mesh())))
    checkpoints.close()
    return restored


def assert_same_run(cfg, other):
    (state, data_state), (expected, expected_data_state) = last_state(cfg), last_state(other)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), state, expected))
    assert data_state == expected_data_state
    assert rows(cfg) == rows(other)


def signals_at(step, monkeypatch, number=1):
    """SIGTERM comes `number` times while step `step` is written down."""
    log_step = loop.log_step

    def log_then_signal(run, pending):
        loss = log_step(run, pending)
        for _ in range(number if pending.step == step else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(loop, "log_step", log_then_signal)


def test_sigterm_saves_the_running_step_and_the_run_continues_bit_for_bit(experiment, monkeypatch):
    whole, cfg = experiment("whole"), experiment("stopped")
    handler = signal.getsignal(signal.SIGTERM)
    loop.train(whole)
    with monkeypatch.context() as patched:
        signals_at(4, patched)
        with pytest.raises(preemption.Preempted, match="after step 5, which is saved"):
            loop.train(cfg)
    assert saved_steps(cfg) == [3, 5]
    loop.train(cfg)
    assert_same_run(cfg, whole)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_second_sigterm_while_saving_changes_nothing(experiment, monkeypatch):
    cfg = experiment()
    save, close = Checkpoints.save, Checkpoints.close

    def signaled(method):
        def call(self, *arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            method(self, *arguments)
            os.kill(os.getpid(), signal.SIGTERM)

        return call

    with monkeypatch.context() as patched:
        signals_at(4, patched, number=2)
        patched.setattr(Checkpoints, "save", signaled(save))
        patched.setattr(Checkpoints, "close", signaled(close))
        with pytest.raises(preemption.Preempted):
            loop.train(cfg)
    steps = saved_steps(cfg)
    state, data_state = last_state(cfg)
    assert int(state.step) == steps[-1] == data_state["next_index"]


def test_the_exit_code_of_a_stopped_run_says_resume_me(experiment, tmp_path, monkeypatch, capsys):
    cfg = experiment()
    signals_at(2, monkeypatch)
    monkeypatch.setattr(train, "parse_experiment", lambda *_, **__: cfg)
    monkeypatch.setattr(train, "enable_compilation_cache", lambda cfg: None)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train"]) == 75
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_IGN, (
        "another one must not change the exit code"
    )
    assert (
        capsys.readouterr().err
        == "stopped by SIGTERM after step 3, which is saved: the same command continues it.\n"
    )


def test_a_step_that_cannot_be_saved_after_sigterm_is_not_said_to_be(experiment, monkeypatch):
    def save(self, step, *rest):
        self._manager.wait_until_finished = full

    def full():
        raise ValueError("No space left on device")

    signals_at(2, monkeypatch)
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(SaveError, match="No space left on device.*no checkpoint was saved"):
        loop.train(experiment())


def test_a_disk_that_is_full_stops_the_run_and_leaves_the_last_checkpoint(
    experiment, monkeypatch, file_size
):
    cfg, log_step = experiment(keep_checkpoints=1), loop.log_step

    def fill_up(run, pending):
        if pending.step == 4:
            run.checkpoints._manager.wait_until_finished()
            file_size(4096)
        return log_step(run, pending)

    with (
        monkeypatch.context() as patched,
        pytest.raises(SaveError, match="last complete checkpoint is of step 3"),
    ):
        patched.setattr(loop, "log_step", fill_up)
        loop.train(cfg)
    file_size()
    assert saved_steps(cfg) == [3]
    assert int(last_state(cfg)[0].step) == 3
    loop.train(cfg)
    assert saved_steps(cfg) == [6]


def test_a_second_process_in_a_work_folder_is_refused_and_a_dead_one_is_not(experiment):
    cfg = experiment()
    holder = (
        "import sys; from vlm_jax.runtime.workdir import Workdir\n"
        "with Workdir(sys.argv[1]).locked(): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, cfg.workdir]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="run is in use: another process trains there"):
            loop.train(cfg)
        assert [path.name for path in Path(cfg.workdir).iterdir()] == [".lock"]
        process.kill()
    with Workdir(cfg.workdir).locked():
        pass


def test_a_work_folder_in_a_bucket_is_refused(experiment):
    with pytest.raises(UserError, match="workdir gs://bucket/run is a URL"):
        loop.train(replace(experiment(), workdir="gs://bucket/run"))


SIGNALED_IN_IMPORT = """
import os, signal, sys
from vlm_jax.cli.main import main

class Finder:
    def find_spec(name, *_):
        if name == "jax":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder)
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_while_jax_is_imported_says_resume_me(experiment):
    process = start(experiment(), "-c", SIGNALED_IN_IMPORT)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75, output
    assert output == "stopped by SIGTERM: the same command continues the run.\n"


def test_a_full_disk_where_the_run_begins_is_a_sentence_and_the_run_may_begin_again(
    experiment, monkeypatch, file_size
):
    cfg, save = experiment(), Tokenizer.save

    def save_on_full_disk(*arguments):
        file_size(1024)
        save(*arguments)

    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match="cannot be written: File too large"),
    ):
        patched.setattr(Tokenizer, "save", save_on_full_disk)
        loop.train(cfg)
    file_size()
    assert not list(Path(cfg.workdir).glob("tokenizer.json*"))
    loop.train(cfg)


def test_a_trace_of_the_steps_that_were_asked_for(experiment):
    cfg = experiment(steps=4, profile_steps="2:3")
    loop.train(cfg)
    assert list(Workdir(cfg.workdir).profile.rglob("*.xplane.pb"))


def start(cfg, *program):
    """Starts `run.py`, or another program, in a process with line-buffered output."""
    path = Path(cfg.workdir).parent / f"{Path(cfg.workdir).name}.py"
    path.write_text(
        "import json\nfrom vlm_jax.config import files\n"
        f"def get_config(): return files.from_json({files.to_json(cfg)!r}, 'config')\n"
    )
    environment = {
        **os.environ,
        # The last flag of a name counts. A client of eight devices has more threads than one of one
        # device, and rounds differently.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    command = [sys.executable, *(program or ["run.py"]), "--config", str(path)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


WITHOUT_FOLDER = """
import sys
from pathlib import Path
from vlm_jax.cli.main import main
from vlm_jax.train import loop

log_step = loop.log_step

def go_away(run, pending):
    if pending.step == 4:  # as a bucket that is mounted there and is no longer
        run.checkpoints._manager.wait_until_finished()
        folder = Path(run.cfg.workdir, "checkpoints")
        folder.rename(folder.with_name("aside"))
        folder.touch()
    return log_step(run, pending)

loop.log_step = go_away
sys.exit(main(sys.argv[1:]))
"""


def test_a_folder_that_goes_away_ends_the_process_and_leaves_the_last_checkpoint(experiment):
    cfg = experiment()
    process = start(cfg, "-c", WITHOUT_FOLDER)
    try:
        # The threads of what cannot be saved wait for 600 s.
        output, _ = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert re.search(
        "error: a checkpoint could not be written to .*checkpoints .*Not a directory", output
    ), output
    folder = Workdir(cfg.workdir).checkpoints
    folder.unlink()
    folder.with_name("aside").rename(folder)
    assert saved_steps(cfg) == [3]
    loop.train(cfg)
    assert saved_steps(cfg)[-1] == 6


def kill_after(process, cfg, step, seconds):
    """`kill -9` some time after this step was printed, wherever the run is by then."""
    for line in process.stdout:
        if (match := re.match(r"step (\d+)/", line)) and int(match[1]) >= step:
            break
    time.sleep(seconds)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before"


def finish(cfg):
    """Runs `cfg` to its end in a process, and returns what it printed."""
    process = start(cfg)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("kind", variants_and_tiles())
def test_killed_at_random_moments_a_run_ends_as_one_that_was_not(experiment, kind):
    steps = {"steps": 30, "checkpoint_every_steps": 1}  # it is saving nearly always
    whole, cfg = experiment("whole", kind, **steps), experiment("killed", kind, **steps)
    finish(whole)
    chance = random.Random(0)
    for step in (3, 10, 17):
        kill_after(start(cfg), cfg, step, chance.uniform(0, 0.5))
    assert "continuing from step" in finish(cfg)
    assert_same_run(cfg, whole)


@pytest.mark.slow
def test_a_process_that_has_two_sigterms_saves_and_exits_with_75(experiment):
    whole, cfg = experiment("whole", steps=200), experiment("stopped", steps=200)
    finish(whole)
    process = start(cfg)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert output.splitlines()[-1].endswith("which is saved: the same command continues it.")
    finish(cfg)
    assert_same_run(cfg, whole)
