"""A trace holds the steps that were asked for, and no other."""

import jax
import pytest

from vlm_jax.config import Train
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.train import loop
from vlm_jax.train.profile import Profile


@pytest.fixture
def events(monkeypatch):
    """Events in order: "start" and "stop" of a trace."""
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    return happened


def take_steps(events, profile_steps, steps):
    profile = Profile(Train(profile_steps=profile_steps), Workdir("run"))
    for step in steps:
        profile.before(step)
        events.append(step)
        profile.after(step, None)
    profile.close()


@pytest.mark.parametrize(
    "profile_steps, steps, expected",
    [
        ("2:4", range(1, 6), [1, "start", 2, 3, 4, "stop", 5]),
        ("3:3", range(1, 6), [1, 2, "start", 3, "stop", 4, 5]),
        ("1:2", range(1, 3), ["start", 1, 2, "stop"]),
        ("", range(1, 3), [1, 2]),
        ("2:4", range(3, 6), ["start", 3, 4, "stop", 5]),  # of a run that continues
        ("2:4", range(5, 7), [5, 6]),
        ("2:4", range(1, 4), [1, "start", 2, 3, "stop"]),  # of one that is stopped
    ],
)
def test_a_trace_begins_before_its_first_step_and_ends_after_its_last(
    events, profile_steps, steps, expected
):
    take_steps(events, profile_steps, steps)
    assert events == expected


def test_only_the_first_process_writes_a_trace(events, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    take_steps(events, "1:2", range(1, 4))
    assert events == [1, 2, 3]


def test_the_loop_traces_the_steps_as_it_takes_them(events, short_run, tmp_path, monkeypatch):
    def noted(step_fn):
        return lambda state, batch: events.append(int(state.step) + 1) or step_fn(state, batch)

    compile_train_step = loop.compile_train_step
    monkeypatch.setattr(
        loop, "compile_train_step", lambda *arguments: noted(compile_train_step(*arguments))
    )
    loop.train(short_run(workdir=tmp_path / "run", steps=4, profile_steps="2:3"))
    assert events == [1, "start", 2, 3, "stop", 4]
