"""The log of a run: one JSON object a row, a bar on a terminal, plain lines elsewhere."""

import json
import os
import sys
import time
from types import SimpleNamespace

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlm_jax.config import Train
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.train.checkpoint import LossSum
from vlm_jax.train.log import Log, StepStats

METRICS = {"loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-3}


@pytest.fixture
def workdir(tmp_path):
    return Workdir(str(tmp_path))


def take_steps(workdir, start, stop, steps=10, every=4):
    log = Log(workdir, start, Train(steps=steps, log_every_steps=every), seconds_at_peak=0.25)
    for step in range(start + 1, stop + 1):
        log.step(
            step,
            METRICS | {"loss": float(step)},
            StepStats(100, 125, 3, 4, 7, data_wait_seconds=0.5),
        )
    log.close()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that the clock of the log shows, its only element."""
    seconds = [0.0]
    fake = SimpleNamespace(**vars(time) | {"perf_counter": lambda: seconds[0]})
    monkeypatch.setattr("vlm_jax.train.log.time", fake)
    return seconds


def rows(workdir):
    return [json.loads(line) for line in workdir.metrics.read_text().splitlines()]


def test_the_first_step_every_nth_and_the_last_are_written_with_all_fields_and_the_mean_loss(
    workdir,
):
    take_steps(workdir, 0, 10)
    assert [(row["step"], row["loss"]) for row in rows(workdir)] == [
        (1, 1.0),
        (4, 3.0),
        (8, 6.5),
        (10, 9.5),
    ]
    speeds = {"step_seconds", "data_wait_seconds", "tokens_per_second", "examples_per_second"}
    for row in rows(workdir):
        fractions = {"padding_fraction", "image_padding_fraction", "mfu"}
        assert set(row) == {"step", *METRICS, *speeds, *fractions, "hbm_peak_bytes"}
        assert row["mfu"] * row["step_seconds"] == pytest.approx(0.25)
        assert row["padding_fraction"] == pytest.approx(0.2)
        assert row["image_padding_fraction"] == pytest.approx(0.25)
        assert row["data_wait_seconds"] == 0.5
        assert row["tokens_per_second"] == pytest.approx(100 / row["step_seconds"])
        assert row["examples_per_second"] == pytest.approx(7 / row["step_seconds"])


def test_tensorboard_shows_the_rows_and_each_step_of_a_continued_run_once(workdir):
    take_steps(workdir, 0, 8, every=2)
    take_steps(workdir, 4, 10, every=2)
    board = EventAccumulator(str(workdir.tensorboard)).Reload()
    shown = {"step", *METRICS, "padding_fraction", "mfu", "tokens_per_second"}
    assert {f"train/{name}" for name in shown - {"step"}} <= set(board.Tags()["scalars"])
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(row["step"], row["loss"]) for row in rows(workdir)]


@pytest.mark.parametrize("peaks, most", [([3, 7, 5], 7), ([3, None], 3), ([None, None], None)])
def test_the_memory_in_a_row_is_that_of_the_fullest_device(workdir, monkeypatch, peaks, most):
    stats = [
        peak and {"peak_bytes_in_use": peak, "bytes_in_use": 1, "bytes_limit": 100}
        for peak in peaks
    ]
    devices = [SimpleNamespace(memory_stats=lambda held=held: held) for held in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    take_steps(workdir, 0, 10)
    assert [row["hbm_peak_bytes"] for row in rows(workdir)] == [most] * 4


def test_a_row_is_on_the_disk_before_the_next_step(workdir, monkeypatch):
    synced = []

    def note(file):
        if os.path.samestat(os.fstat(file), workdir.metrics.stat()):
            synced.append(len(rows(workdir)))

    monkeypatch.setattr(os, "fsync", note)
    take_steps(workdir, 0, 10)
    assert synced == [1, 2, 3, 4]


@pytest.mark.parametrize("left", [b'{"step": 3, "lo', b"\0\0\0\xff\n", b"3\n"])
def test_a_run_that_continues_forgets_what_comes_again_and_half_a_line(workdir, left):
    take_steps(workdir, 0, 8, every=2)
    with open(workdir.metrics, "ab") as file:
        file.write(left)
    take_steps(workdir, 4, 10, every=2)
    assert [row["step"] for row in rows(workdir)] == [1, 2, 4, 6, 8, 10]


def test_plain_lines_where_there_is_no_terminal(workdir, capsys):
    take_steps(workdir, 0, 10)
    out, err = capsys.readouterr()
    assert [line.split("  ")[:2] for line in out.splitlines()] == [
        ["step 1/10", "loss 1.0000"],
        ["step 4/10", "loss 3.0000"],
        ["step 8/10", "loss 6.5000"],
        ["step 10/10", "loss 9.5000"],
    ]
    assert "\r" not in out + err


def test_a_bar_on_a_terminal(workdir, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    take_steps(workdir, 0, 10)
    out, err = capsys.readouterr()
    assert out == ""
    assert "10/10" in err
    assert "loss 9.5000" in err


def test_a_validation_has_its_own_row_and_line_and_is_left_out_of_the_speed(workdir, clock, capsys):
    log = Log(workdir, 0, Train(steps=2), seconds_at_peak=0.25)
    clock[0] += 0.5
    log.validation(1, {"val/loss": 0.25, "val/anls": 1.0}, seconds=0.3)
    log.step(1, METRICS, StepStats(100, 125, 3, 4, 7, data_wait_seconds=0.0))
    log.close()
    scores = {"val/loss": 0.25, "val/anls": 1.0, "validation_seconds": 0.3}
    assert rows(workdir)[0] == {"step": 1, **scores}
    assert rows(workdir)[1]["step_seconds"] == pytest.approx(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "validation 1/2  val/loss 0.2500  val/anls 1.0000  0.3 s"
    board = EventAccumulator(str(workdir.tensorboard)).Reload()
    assert scores.keys() <= set(board.Tags()["scalars"])


def test_the_compilation_is_reported_and_left_out_of_the_speed(workdir, clock, capsys):
    log = Log(workdir, 0, Train(steps=2), seconds_at_peak=0.25)
    with log.compiling():
        clock[0] += 0.3
    clock[0] += 0.2
    log.step(1, METRICS, StepStats(100, 125, 3, 4, 7, data_wait_seconds=0.0))
    log.close()
    assert rows(workdir)[0]["step_seconds"] == pytest.approx(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["compiling the training step ...", "compiled in 0.3 s"]
    assert lines[2].startswith("step 1/2 ")


def test_the_sources_of_a_mixture_have_losses_and_shares_over_the_steps_of_a_row(workdir):
    """A continued run has the sums of the steps before its checkpoint."""
    stats = StepStats(100, 125, 3, 4, 7, data_wait_seconds=0.5)
    train = Train(steps=4, log_every_steps=3)
    names = ["talks", "scans"]
    log = Log(workdir, 0, train, None, source_names=names)
    log.step(1, METRICS, stats, [[6.0, 3, 30], [0.0, 0, 10]])
    log.step(2, METRICS, stats, [[1.0, 1, 30], [8.0, 2, 30]])
    saved = json.loads(json.dumps(log.loss_sum))
    log.close()
    log = Log(workdir, 2, train, None, LossSum(*saved), source_names=names)
    log.step(3, METRICS, stats, [[5.0, 2, 10], [1.0, 1, 30]])
    log.close()
    sources = [{name: row[name] for name in row if "/" in name} for row in rows(workdir)]
    assert sources == [
        {
            **{"loss/talks": 2.0, "loss/scans": None},
            **{"token_share/talks": 0.75, "token_share/scans": 0.25},
        },
        {
            **{"loss/talks": 2.0, "loss/scans": 3.0},
            **{"token_share/talks": 0.4, "token_share/scans": 0.6},
        },
    ]
