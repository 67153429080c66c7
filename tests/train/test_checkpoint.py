"""A checkpoint is restored as it was saved; a damaged one is reported, skipped and written anew."""

import contextlib
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from orbax.checkpoint._src.path import atomicity

from tests.limits import LIMIT_SECONDS
from vlm_jax import axes, sharding
from vlm_jax.config import ConfigError, Mesh, Train, UserError
from vlm_jax.runtime import distributed
from vlm_jax.structs import State
from vlm_jax.train.checkpoint import Checkpoints, SaveError

SMALL = [((64,), np.float32), ((), np.int32)]
TRAIN = Train(keep_checkpoints=3)
DATA_STATE = {"next_index": 12, "inner": [1, 2]}


def mesh_of(*shape):
    return axes.make_mesh(Mesh(*shape))


def like(mesh):
    """Shapes of a small state: a sharded matrix and its moment, a vector, and integers."""
    spec = axes.parameter_spec("D F", (32, 64), mesh)
    sharded = jax.ShapeDtypeStruct((32, 64), np.float32, sharding=NamedSharding(mesh, spec))
    vector, count = (
        jax.ShapeDtypeStruct(shape, kind, sharding=sharding.replicated(mesh))
        for shape, kind in SMALL
    )
    return State(
        count, {"mlp": {"kernel": sharded, "bias": vector}}, (count, {("mlp", "kernel"): sharded})
    )


@pytest.fixture(scope="module")
def state():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jax.device_put(rng.uniform(0, 9, x.shape).astype(x.dtype), x.sharding),
        like(mesh_of(2, 2, 2)),
    )


def saved(path: Path, state, steps, losses=None, **settings) -> None:
    checkpoints = Checkpoints(path, replace(TRAIN, **settings))
    for step, loss in zip(steps, losses or [1.0] * len(steps)):
        checkpoints.save(step, at_step(state, step), DATA_STATE | {"next_index": step}, loss)
    checkpoints.close()


def at_step(state, step):
    return state.replace(step=state.step + step)


def restored(path: Path, *mesh_shape):
    checkpoints = Checkpoints(path, TRAIN)
    actual = checkpoints.restore(like(mesh_of(*mesh_shape or (2, 2, 2))))
    checkpoints.close()
    return actual


def equal(state, other) -> bool:
    return jax.tree.all(
        jax.tree.map(
            lambda a, b: np.array_equal(jax.device_get(a), jax.device_get(b)), state, other
        )
    )


def test_what_is_restored_is_what_was_saved(tmp_path, state):
    saved(tmp_path, state, [7])
    actual, data_state = restored(tmp_path)
    assert data_state == DATA_STATE | {"next_index": 7}
    assert equal(actual, at_step(state, 7))
    assert jax.tree.map(lambda x: x.sharding, actual) == jax.tree.map(lambda x: x.sharding, state)


def test_a_checkpoint_comes_back_on_another_mesh(tmp_path, state):
    saved(tmp_path, state, [7])
    actual, _ = restored(tmp_path, 1, 8, 1)
    assert equal(actual, at_step(state, 7))
    assert actual.params["mlp"]["kernel"].addressable_shards[0].data.shape == (4, 64)


def test_nothing_saved_is_none(tmp_path):
    assert restored(tmp_path) is None


def test_the_last_few_are_kept(tmp_path, state):
    saved(tmp_path, state, [1, 2, 3, 4], keep_checkpoints=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    assert equal(restored(tmp_path)[0], at_step(state, 4))


def test_the_best_and_every_so_many_are_kept_too_over_a_restart(tmp_path, state):
    settings = {"keep_checkpoints": 1, "keep_best": 2, "keep_every_steps": 4}
    saved(tmp_path, state, [1, 2, 3, 4, 5, 6], losses=[5.0, 0.2, 3.0, 9.0, 0.1, 4.0], **settings)
    assert steps_in(tmp_path) == [2, 4, 5, 6]
    saved(tmp_path, state, [7, 8, 9], losses=[0.3, 7.0, 0.15], **settings)
    assert steps_in(tmp_path) == [4, 5, 8, 9]


def steps_in(path: Path) -> list[int]:
    return sorted(int(folder.name) for folder in path.iterdir())


def test_a_step_that_is_there_already_is_left_alone(tmp_path, state):
    saved(tmp_path, state, [2])
    before = (tmp_path / "2").stat().st_mtime_ns
    saved(tmp_path, state, [2])
    assert (tmp_path / "2").stat().st_mtime_ns == before


def cut_the_numbers(step: Path) -> None:
    for path in (step / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_numbers(step: Path) -> None:
    shutil.rmtree(step / "state")


def lose_the_data_state(step: Path) -> None:
    shutil.rmtree(step / "data")


def cut_the_data_state(step: Path) -> None:
    for path in (step / "data").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:3])


def lose_everything(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = (
    cut_the_numbers,
    lose_the_numbers,
    lose_the_data_state,
    cut_the_data_state,
    lose_everything,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, state, damage, capsys):
    saved(tmp_path, state, [1, 2])
    damage(tmp_path / "2")
    actual, data_state = restored(tmp_path)
    assert equal(actual, at_step(state, 1))
    assert data_state["next_index"] == 1
    assert "checkpoint 2 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_continues_over_a_damaged_checkpoint(tmp_path, state, damage, capsys):
    saved(tmp_path, state, [1, 2])
    damage(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, TRAIN)
    actual, _ = checkpoints.restore(like(mesh_of(2, 2, 2)))
    checkpoints.save(2, at_step(actual, 1), DATA_STATE | {"next_index": 99}, 1.0)
    checkpoints.close()
    capsys.readouterr()
    again, data_state = restored(tmp_path)
    assert equal(again, at_step(state, 2))
    assert data_state["next_index"] == 99
    assert capsys.readouterr().out == ""


def test_a_checkpoint_that_another_process_cannot_read_is_passed_over_by_all(
    tmp_path, state, monkeypatch, capsys
):
    @contextlib.contextmanager
    def together():
        yield
        if refused:
            raise ConfigError(refused.pop())

    refused = ["process 1: cut short"]
    saved(tmp_path, state, [1, 2])
    monkeypatch.setattr(distributed, "raise_on_all", together)
    assert equal(restored(tmp_path)[0], at_step(state, 1))
    assert (
        "checkpoint 2 is damaged and is skipped (process 1: cut short)" in capsys.readouterr().out
    )


@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_that_stops_before_it_reaches_damaged_checkpoints_is_saved(tmp_path, state, keep):
    saved(tmp_path, state, [1, 3, 4])
    for step in ("3", "4"):
        cut_the_numbers(tmp_path / step)
    checkpoints = Checkpoints(tmp_path, replace(TRAIN, keep_checkpoints=keep))
    actual, _ = checkpoints.restore(like(mesh_of(2, 2, 2)))
    checkpoints.save(2, at_step(actual, 1), DATA_STATE, 1.0)
    checkpoints.close()
    assert equal(restored(tmp_path)[0], at_step(state, 2))
    assert steps_in(tmp_path) == [1, 2][-keep:]


def test_a_checkpoint_that_orbax_leaves_out_is_said_so(tmp_path, state, monkeypatch):
    checkpoints = Checkpoints(tmp_path, TRAIN)
    monkeypatch.setattr(checkpoints._manager, "save", lambda *args, **kwargs: False)
    with pytest.raises(SaveError, match="could not be written"):
        checkpoints.save(1, state, DATA_STATE, 1.0)


def test_where_every_checkpoint_is_damaged_nothing_is_begun_anew(tmp_path, state, capsys):
    saved(tmp_path, state, [1, 2])
    for step in ("1", "2"):
        cut_the_numbers(tmp_path / step)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"all checkpoints in {tmp_path} are damaged"):
        restored(tmp_path)
    out = capsys.readouterr().out
    assert "checkpoint 2" in out
    assert "checkpoint 1" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_whose_loss_is_damaged_has_no_rank_and_is_whole(tmp_path, state):
    settings = {"keep_checkpoints": 1, "keep_best": 1}
    saved(tmp_path, state, [1, 2], losses=[0.1, 9.0], **settings)
    (tmp_path / "2" / "metrics" / "metrics").write_text("{")
    assert equal(restored(tmp_path)[0], at_step(state, 2))
    saved(tmp_path, state, [3], **settings)
    assert steps_in(tmp_path) == [1, 3]


@pytest.mark.parametrize("moment", ["save", "wait_until_finished", "close"])
def test_a_checkpoint_that_cannot_be_written_is_said_so(tmp_path, state, moment, monkeypatch):
    def write(*args, **kwargs):
        raise ValueError("No space left on device\n and more")

    checkpoints = Checkpoints(tmp_path, TRAIN)
    monkeypatch.setattr(checkpoints._manager, moment, write)
    message = (
        rf"could not be written to {tmp_path} \(No space left on device\); "
        r"the last complete checkpoint .* step 7\.$"
    )
    (tmp_path / "7").mkdir()
    with pytest.raises(SaveError, match=message):
        checkpoints.save(1, at_step(state, 1), DATA_STATE, 1.0)
        checkpoints.close()


def test_the_next_step_need_not_wait_until_the_files_are_written(tmp_path, state, monkeypatch):
    go_on, finalize = threading.Event(), atomicity.AtomicRenameTemporaryPath.finalize

    async def finalize_late(*arguments, **named):
        go_on.wait(LIMIT_SECONDS)
        await finalize(*arguments, **named)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", finalize_late)
    checkpoints = Checkpoints(tmp_path, TRAIN)
    checkpoints.save(1, at_step(state, 1), DATA_STATE, 1.0)
    assert not (tmp_path / "1").exists()
    go_on.set()
    checkpoints.close()
    assert steps_in(tmp_path) == [1]


def test_what_a_crash_left_while_saving_is_no_checkpoint(tmp_path, state):
    saved(tmp_path, state, [1, 2])
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path, TRAIN)
    actual, _ = checkpoints.restore(like(mesh_of(2, 2, 2)))
    assert equal(actual, at_step(state, 1))
    checkpoints.save(2, at_step(state, 2), DATA_STATE, 1.0)
    checkpoints.close()
    assert equal(restored(tmp_path)[0], at_step(state, 2))
