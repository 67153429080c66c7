"""Stopped and continued = never stopped, bit for bit; mistakes are refused before any write."""

import contextlib
import functools
import io
import json
import re
import shutil
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from vlm_jax import axes
from vlm_jax.config import (
    Eval,
    LrMult,
    Mesh,
    Optim,
    Train,
    UserError,
)
from vlm_jax.data import pipeline
from vlm_jax.infer.validation import prepare_scores
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import tiny, variants_and_tiles, write_conversations
from vlm_jax.train import inputs, loop, optim, summary
from vlm_jax.train.step import state_shapes

SAME = ("step", "loss", "grad_norm", "learning_rate", "padding_fraction", "image_padding_fraction")
TIMES = ("step_seconds", "data_wait_seconds", "tokens_per_second", "examples_per_second", "mfu")


SAVED = {"steps": 6, "checkpoint_every_steps": 2}
EIGHT_DEVICES = "unified on eight devices"


@pytest.fixture
def experiment(short_run, tmp_path):
    """`experiment(workdir, **sections)`: one that has not begun."""
    return lambda workdir="run", **sections: replace(
        short_run(workdir=tmp_path / workdir, **SAVED), **sections
    )


@pytest.fixture(scope="module")
def use_devices():
    """`use_devices(name)`: 8 for EIGHT_DEVICES; 1 for other runs, which compile faster."""
    make_mesh = axes.make_mesh
    with pytest.MonkeyPatch.context() as patch:

        def use(name):
            devices = jax.devices()[: 8 if name == EIGHT_DEVICES else 1]
            patch.setattr(axes, "make_mesh", functools.partial(make_mesh, devices=devices))

        yield use


@pytest.fixture(autouse=True)
def one_device(use_devices):
    use_devices("unified")


@pytest.fixture(scope="module")
def whole(short_run, tmp_path_factory, use_devices):
    """`whole(name)`: config, last state and output of a run that was never stopped.

    Tests leave its work folder as it is.
    """

    @functools.cache
    def make(name="unified"):
        use_devices(name)
        folder = tmp_path_factory.mktemp(name) / "run"
        if name == EIGHT_DEVICES:
            cfg = replace(short_run(workdir=folder, **SAVED), mesh=Mesh(data=1, fsdp=8))
        else:
            cfg = short_run(name, folder, **SAVED)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            state = loop.train(cfg)
        return cfg, state, output.getvalue()

    return make


@pytest.fixture
def finished(whole, use_devices, tmp_path):
    """`finished(name)`: a copy of that run which a test may change, and the last state."""

    def make(name="unified"):
        cfg, state, _ = whole(name)
        use_devices(name)
        return replace(cfg, workdir=str(shutil.copytree(cfg.workdir, tmp_path / "copy"))), state

    return make


def forget_step_6(cfg):
    """Leaves the work folder of a machine that crashed after step 6, before it was saved."""
    shutil.rmtree(Workdir(cfg.workdir).checkpoints / "6")


class Stopped(Exception):
    pass


def train_until(cfg, step, monkeypatch):
    """Trains until step `step` has been written down, as if the machine had then gone away."""
    log_step = loop.log_step

    def log_then_stop(run, pending):
        loss = log_step(run, pending)
        if pending.step == step:
            raise Stopped
        return loss

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(loop, "log_step", log_then_stop)
        loop.train(cfg)


def rows(cfg):
    return [json.loads(line) for line in Workdir(cfg.workdir).metrics.read_text().splitlines()]


def same(rows):
    """The metrics that do not depend on the machine."""
    return [[row[key] for key in SAME] for row in rows]


def saved_steps(cfg):
    return sorted(int(path.name) for path in Workdir(cfg.workdir).checkpoints.iterdir())


def files(cfg):
    """Every file of the work folder and its content."""
    folder = Workdir(cfg.workdir).path
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_equal(state, other):
    for path, value in jax.tree.leaves_with_path(jax.device_get(state)):
        expected = dict(jax.tree.leaves_with_path(jax.device_get(other)))[path]
        assert np.array_equal(value, expected), jax.tree_util.keystr(path)


# Parameters of every part, and images in tiles; tests/train/test_survival.py has every variant.
@pytest.mark.parametrize("name", ["unified", "hybrid in tiles", EIGHT_DEVICES])
def test_stopped_and_continued_is_never_stopped_bit_for_bit(name, finished, capsys):
    cfg, expected = finished(name)
    expected_rows = rows(cfg)
    forget_step_6(cfg)
    capsys.readouterr()
    state = loop.train(cfg)
    assert f"continuing from step 4 in {cfg.workdir}" in capsys.readouterr().out
    assert_equal(state, expected)
    assert same(rows(cfg)) == same(expected_rows)
    assert [row["step"] for row in rows(cfg)] == [1, 2, 3, 4, 5, 6]
    assert len({row["loss"] for row in rows(cfg)}) == 6


@pytest.fixture(scope="module")
def validated(short_run, tmp_path_factory, use_devices):
    """The config of a run that validates on two splits every 2 steps, and its last state."""
    use_devices("unified")
    cfg = short_run(workdir=tmp_path_factory.mktemp("validated") / "run", **SAVED)
    splits = {"splits": ("a=test[:6]", "b=test[6:10]"), "during_examples": 8}
    cfg = replace(cfg, eval=replace(cfg.eval, every_steps=2, max_new_tokens=2, **splits))
    return cfg, loop.train(cfg, prepare_scores)


def validations(cfg):
    """The scores of the validations, without their seconds."""
    scores = [row for row in rows(cfg) if "validation_seconds" in row]
    return [row | {"validation_seconds": None} for row in scores]


def test_validation_on_two_splits_changes_nothing_of_the_training(validated, whole):
    cfg, state = validated
    expected_cfg, expected, _ = whole()
    assert_equal(state, expected)
    steps = [row for row in rows(cfg) if "validation_seconds" not in row]
    assert same(steps) == same(rows(expected_cfg))
    names = ["a/loss", "a/exact_match", "b/loss", "b/exact_match"]
    for row in validations(cfg):
        assert list(row) == ["step", *names, "validation_seconds"]
    losses = [row["a/loss"] for row in validations(cfg)]
    assert losses == sorted(losses, reverse=True), "the model learns"
    assert abs(losses[-1] - rows(expected_cfg)[-1]["loss"]) < 0.5


def test_a_run_with_validation_continues_bit_for_bit(validated, tmp_path):
    cfg, expected = validated
    cfg = replace(cfg, workdir=str(shutil.copytree(cfg.workdir, tmp_path / "copy")))
    before = validations(cfg)
    forget_step_6(cfg)
    assert_equal(loop.train(cfg, prepare_scores), expected)
    assert validations(cfg) == before
    assert [row["step"] for row in before] == [2, 4, 6]


@pytest.fixture(scope="module")
def sparse(short_run, tmp_path_factory, use_devices):
    """The config of a run with rows of steps 1, 5 and 6."""
    use_devices("unified")
    folder = tmp_path_factory.mktemp("sparse") / "run"
    cfg = short_run(workdir=folder, **SAVED)
    cfg = replace(cfg, train=replace(cfg.train, log_every_steps=5))
    loop.train(cfg)
    return cfg


def test_the_logged_loss_is_the_mean_since_the_last_row(sparse, whole):
    loss = [row["loss"] for row in rows(whole()[0])]
    assert [row["step"] for row in rows(sparse)] == [1, 5, 6]
    means = [loss[0], np.mean(loss[1:5]), loss[5]]
    assert [row["loss"] for row in rows(sparse)] == pytest.approx(means)


def test_a_mean_loss_over_a_checkpoint_is_the_same_in_a_continued_run(sparse, tmp_path):
    """Saved after steps 2, 4 and 6: the losses of steps 2 to 4 come from the checkpoint."""
    cfg = replace(sparse, workdir=str(shutil.copytree(sparse.workdir, tmp_path / "copy")))
    before = same(rows(cfg))
    for last in ("6", "4"):
        shutil.rmtree(Workdir(cfg.workdir).checkpoints / last)
        loop.train(cfg)
        assert same(rows(cfg)) == before


def test_a_block_about_the_run_and_the_compilation_come_before_the_first_step(whole):
    cfg, _, output = whole()
    lines = output.splitlines()
    names = [line.split("  ")[0] for line in lines]
    first = names.index("model")
    block = ["model", "parameters", "devices", "data", "steps", "work folder", "curves"]
    assert names[first : first + 7] == block
    stages = [
        "an image (64 px)",
        "ViT 2 x 32",
        "linear projector",
        "16 tokens",
        "decoder 2 x 32 (blocks x width)",
    ]
    assert lines[first].endswith(f"unified: {' -> '.join(stages)}")
    assert lines[first + 1].endswith(", all trained")
    assert lines[first + 2].endswith("1 x cpu, mesh data 1 x fsdp 1 x tensor 1")
    assert "5.0 steps" in lines[first + 3], "40 images in batches of 8"
    assert lines[first + 6].endswith(f"tensorboard --logdir {cfg.workdir}")
    assert lines[first + 7] == "compiling the training step ..."
    assert re.match(r"compiled in \d+\.\d s", lines[first + 8])
    assert lines[first + 9].startswith("step 1/6  loss ")


def test_the_block_names_the_frozen_parts_and_their_share():
    cfg = tiny("cross_attention", optim=Optim(lr_mult=LrMult(vision=0, decoder=0)))
    params = state_shapes(cfg).params
    trained, frozen = optim.split(params, cfg.optim)
    sizes = [sum(x.size for x in part.values()) for part in (trained, frozen)]
    expected = f"{sum(sizes):,}, {sizes[0] / sum(sizes):.1%} trained; frozen: vision, decoder"
    assert summary.describe_parameters(cfg, params) == expected


def test_the_block_says_that_a_short_run_has_a_shorter_warm_up():
    cfg = tiny(optim=Optim(warmup_steps=100), train=Train(steps=30, batch_size=8))
    expected = "30 of 8 rows, warm-up of 29 instead of optim.warmup_steps 100"
    assert summary.describe_steps(cfg, start=0) == expected
    whole = replace(cfg, train=replace(cfg.train, steps=101))
    assert summary.describe_steps(whole, start=7) == "101 of 8 rows, continuing after step 7"


@pytest.mark.parametrize("kind", ["text_only", "hybrid"])
def test_the_block_describes_models_without_images_and_with_tiles(kind):
    cfg = variants_and_tiles()["hybrid"] if kind == "hybrid" else tiny(kind)
    text = summary.describe_model(cfg)
    assert text.startswith(f"{kind}: ")
    assert ("px" in text) == (kind == "hybrid")


def test_a_run_on_conversations_continues_bit_for_bit(tmp_path):
    cfg = replace(
        tiny(data=write_conversations(tmp_path)), eval=Eval(split=""), workdir=str(tmp_path / "run")
    )
    cfg = replace(cfg, decoder=replace(cfg.decoder, max_positions=128))
    expected = loop.train(cfg)
    before = rows(cfg)
    assert before[0]["examples_per_second"] * before[0]["step_seconds"] > 8 * 1.5, (
        "a row holds some conversations"
    )
    shutil.rmtree(Workdir(cfg.workdir).checkpoints / "4")
    assert_equal(loop.train(cfg), expected)
    assert same(rows(cfg)) == same(before)


class Slow:
    """An iterator whose every batch takes a tenth of a second more."""

    def __init__(self, data):
        self.data, self.get_state, self.set_state = data, data.get_state, data.set_state
        self.start_prefetch = data.start_prefetch

    def __next__(self):
        time.sleep(0.1)
        return next(self.data)


def test_an_interrupted_run_has_its_last_checkpoint_and_continues_bit_for_bit(
    experiment, whole, monkeypatch, capsys
):
    """Its batches take longer, and its metrics show the wait."""
    cfg, iterator = experiment(), pipeline.training_iterator
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "training_iterator", lambda *args: Slow(iterator(*args)))
        train_until(cfg, 5, monkeypatch)
    assert "continuing" not in capsys.readouterr().out
    assert saved_steps(cfg) == [2, 4]
    assert [row["step"] for row in rows(cfg)] == [1, 2, 3, 4, 5]
    assert all(row["data_wait_seconds"] >= 0.1 for row in rows(cfg))
    assert_equal(loop.train(cfg), whole()[1])


def test_a_run_continues_over_a_checkpoint_that_is_half_written(finished, capsys):
    cfg, expected = finished()
    for path in (Workdir(cfg.workdir).checkpoints / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    assert_equal(loop.train(cfg), expected)
    out = capsys.readouterr().out
    assert "checkpoint 6 is damaged" in out
    assert "continuing from step 4" in out
    assert_equal(loop.train(cfg), expected)
    out = capsys.readouterr().out
    assert "continuing from step 6" in out, "the step is written anew"
    assert "damaged" not in out


def test_a_finished_run_trains_no_more(finished, capsys):
    cfg, expected = finished()
    before = files(cfg)
    assert_equal(loop.train(cfg), expected)
    assert "continuing from step 6" in capsys.readouterr().out
    after = files(cfg)
    moved = {"config.json"}  # it has the path of the run
    assert all(after[name] == before[name] for name in set(before) - moved)
    assert all(name.startswith("tensorboard") for name in set(after) - set(before))


def test_another_config_is_refused_with_the_difference_and_nothing_changes(finished):
    cfg, _ = finished()
    before = files(cfg)
    other = replace(cfg, seed=3, train=replace(cfg.train, steps=12))
    with pytest.raises(UserError) as error:
        loop.train(other)
    assert "train.steps: 6 -> 12" in str(error.value)
    assert "seed: 0 -> 3" in str(error.value)
    assert "optim" not in str(error.value)
    assert files(cfg) == before


def on_another_mesh(cfg):
    return replace(cfg, mesh=Mesh(data=1, fsdp=8))


def in_less_memory(cfg):
    vision, decoder = (
        replace(cfg.vision, remat="full"),
        replace(cfg.decoder, remat="dots", unroll=2),
    )
    train = replace(cfg.train, microbatches=2, loss_chunk=40)
    return replace(
        cfg, vision=vision, decoder=decoder, train=train, mesh=Mesh(data=2, fsdp=2, tensor=2)
    )


@pytest.mark.parametrize("otherwise", [on_another_mesh, in_less_memory])
def test_a_run_may_continue_on_eight_devices(otherwise, finished, use_devices, capsys):
    cfg, expected = finished()
    before = rows(cfg)
    forget_step_6(cfg)
    use_devices(EIGHT_DEVICES)
    state = loop.train(otherwise(cfg))
    assert "continuing from step 4" in capsys.readouterr().out
    assert [row["step"] for row in rows(cfg)] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(rows(cfg)[4:], before[4:]):
        np.testing.assert_allclose(
            [row[key] for key in SAME], [other[key] for key in SAME], rtol=1e-4
        )
    for value, expected_value in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected.params)
    ):
        np.testing.assert_allclose(value, expected_value, atol=2e-3)


def test_the_metrics_of_a_step_have_every_field(whole):
    cfg = whole()[0]
    row = rows(cfg)[1]
    assert set(row) == {*SAME, *TIMES, "hbm_peak_bytes"}
    assert row["hbm_peak_bytes"] is None, "not reported on CPU"
    assert 0 < row["mfu"] < 1
    assert 0 <= row["data_wait_seconds"] < row["step_seconds"]
    assert row["examples_per_second"] * row["step_seconds"] == pytest.approx(8 * 3)
    tokens = row["tokens_per_second"] * row["step_seconds"]
    assert row["padding_fraction"] == pytest.approx(1 - tokens / (8 * cfg.row_length))


def test_a_batch_that_the_devices_do_not_divide_is_refused_and_nothing_is_written(
    experiment, use_devices
):
    cfg = experiment(train=Train(batch_size=12))
    use_devices(EIGHT_DEVICES)
    with pytest.raises(UserError, match="train.batch_size 12 .* 8 devices"):
        loop.train(cfg)
    assert not Workdir(cfg.workdir).path.exists()
    inputs.check_rows(
        cfg, axes.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    )  # 4 row shards do divide it


def test_a_work_folder_that_cannot_be_made_is_refused(experiment, tmp_path):
    (tmp_path / "file").write_text("keep me")
    for path in ("file", "file/run"):
        with pytest.raises(UserError, match=f"workdir {tmp_path / path} cannot be written"):
            loop.train(experiment(workdir=path))
    assert (tmp_path / "file").read_text() == "keep me"


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda cfg: replace(cfg, data=replace(cfg.data, train_split="trian")),
            "data.train_split 'trian'",
        ),
        (lambda cfg: replace(cfg, data=replace(cfg.data, text_length=3)), "data.text_length 3"),
        (
            lambda cfg: replace(cfg, data=replace(cfg.data, text_length=22, questions_per_row=1)),
            "a question has 23 tokens with its answer",
        ),
        (lambda cfg: replace(cfg, eval=replace(cfg.eval, split="tset")), "eval.split 'tset'"),
        (
            lambda cfg: replace(cfg, eval=replace(cfg.eval, max_new_tokens=100)),
            "decoder.max_positions 128 has no room",
        ),
        (
            lambda cfg: replace(cfg, decoder=replace(cfg.decoder, vocab_size=200)),
            "decoder.vocab_size 200",
        ),
    ],
    ids=[
        "train_split",
        "text_length",
        "text_length_of_a_later_batch",
        "eval.split",
        "max_new_tokens",
        "vocab_size",
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(
    experiment, change, named
):
    cfg = change(experiment())
    with pytest.raises(UserError, match=named):
        loop.train(cfg)
    assert not Workdir(cfg.workdir).path.exists()


def test_what_is_left_out_of_the_rows_is_said_before_the_training(experiment, capsys):
    cfg = experiment()
    tokenizer = pipeline.train_tokenizer(cfg)
    capsys.readouterr()
    for text_length, lines in ((100, 0), (40, 1)):
        shorter = replace(cfg, data=replace(cfg.data, text_length=text_length))
        inputs.check_data(shorter, tokenizer, pipeline.training_iterator(shorter, tokenizer))
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == lines
        assert all(
            "120 questions in 40 training rows" in line and "data.text_length 40" in line
            for line in printed
        )


def test_a_look_at_the_data_takes_nothing_from_it(experiment):
    cfg = experiment()
    tokenizer = pipeline.train_tokenizer(cfg)
    data, untouched = (pipeline.training_iterator(cfg, tokenizer) for _ in range(2))
    inputs.check_data(cfg, tokenizer, data)
    assert jax.tree.all(jax.tree.map(np.array_equal, next(data), next(untouched)))
