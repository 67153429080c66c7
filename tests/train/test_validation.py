"""Validation while training: the best checkpoint, patience, resume, overlap, trackers."""

import contextlib
import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from vlm_jax import axes, sharding
from vlm_jax.config import (
    ConfigError,
    Data,
    Eval,
    Lora,
    Mesh,
    NonFiniteError,
    Source,
    UserError,
)
from vlm_jax.config.validate import validate
from vlm_jax.data import overlap, pipeline, text
from vlm_jax.data.questions import Question
from vlm_jax.infer.metrics.scores import check_best_metric
from vlm_jax.infer.validation import Scorer, Split, prepare_scores
from vlm_jax.nn import lora
from vlm_jax.runtime.preemption import Preempted
from vlm_jax.runtime.stop_signal import StopSignal
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.structs import State
from vlm_jax.testing import random_params, tiny, write_conversations
from vlm_jax.train import loop, trackers
from vlm_jax.train.inputs import Inputs
from vlm_jax.train.validation import ScoreHistory, Validation, score_name

EVERY = {"every_steps": 1, "splits": ("a=test[:6]",)}


@pytest.fixture
def make(short_run, tmp_path):
    """`make(eval fields, train fields)`: a new run of 6 steps."""
    numbers = itertools.count()

    def make_run(eval_fields=None, **train):
        folder = tmp_path / f"run_{next(numbers)}"
        cfg = short_run(workdir=folder, **{"steps": 6, "checkpoint_every_steps": 6, **train})
        return replace(cfg, eval=replace(cfg.eval, **(eval_fields or {})))

    return make_run


class Counter:
    """Stands in for the data: its state is the number of batches."""

    def __init__(self):
        self.count = 0

    def __next__(self):
        self.count += 1
        return np.zeros(8, np.float32)

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]

    def start_prefetch(self):
        pass


@pytest.fixture
def train(monkeypatch):
    """`train(cfg, scores)`: the real loop with a model of one number, and these scores in turn."""
    mesh = axes.make_mesh(Mesh(), jax.devices()[:1])
    abstract = State(*(jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(mesh)),) * 3)

    def step(state, batch):
        one = {"loss": np.float32(1), "grad_norm": np.float32(1), "learning_rate": np.float32(1)}
        return state.replace(step=state.step + 1, params=state.params + 2), one

    def zeros(*arguments):
        return jax.tree.map(lambda x: jax.device_put(np.int32(0), x.sharding), abstract)

    stand_ins = {
        "prepare": lambda cfg, workdir: Inputs(mesh, None, Counter(), None, {}, {}, None),
        "open_workdir": lambda cfg, workdir, inputs: workdir.open(cfg),
        "abstract_state": lambda cfg, mesh: abstract,
        "init_sharded_state": zeros,
        "compile_step": lambda *arguments: step,
        "count_tokens": lambda batch: (1, 1, 1, 1, 1),
        "summarize": lambda *arguments: "",
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(loop, name, stand_in)
    monkeypatch.setattr(loop.initial, "load_parts", lambda *arguments: {})

    def run(cfg, *scores):
        remaining = iter(scores)

        def compute(params):
            return {"a/loss": 9.0} | {score_name(cfg): next(remaining)}

        state = loop.train(cfg, lambda cfg, inputs: compute)
        assert not list(remaining), "every score is used"
        return state

    return run


def rows(cfg):
    """The validations of metrics.jsonl, without their seconds."""
    lines = [json.loads(line) for line in Workdir(cfg.workdir).metrics.read_text().splitlines()]
    return [(row["step"], row["a/loss"]) for row in lines if "a/loss" in row]


def saved_steps(cfg):
    return sorted(int(path.name) for path in Workdir(cfg.workdir).checkpoints.iterdir())


def named_best(cfg):
    return json.loads(Workdir(cfg.workdir).best.read_text())


@pytest.fixture
def sigterm_at(monkeypatch):
    """`with sigterm_at(step)`: the run is stopped by SIGTERM in a step."""

    @contextlib.contextmanager
    def stop(step):
        steps = itertools.count(1)
        with monkeypatch.context() as patched, pytest.raises(Preempted):
            patched.setattr(StopSignal, "received", lambda self: next(steps) == step)
            yield

    return stop


def test_the_best_checkpoint_is_that_of_the_best_score(make, train):
    cfg = make(EVERY, keep_checkpoints=1, keep_best=1)
    train(cfg, 3.0, 1.0, 2.0, 1.0, 1.5, 1.2)
    assert saved_steps(cfg) == [2, 6]
    assert (named_best(cfg)["step"], named_best(cfg)["metric"]) == (2, "a/loss")
    cfg = make(EVERY, keep_checkpoints=1, keep_best=1, best_metric="a/exact_match")
    train(cfg, 0.1, 0.2, 0.7, 0.3, 0.7, 0.1)
    assert saved_steps(cfg) == [3, 6]
    assert named_best(cfg)["scores"] == {"a/loss": 9.0, "a/exact_match": 0.7}


def test_sigterm_leaves_the_validation_of_its_step_to_the_continued_run(make, train, sigterm_at):
    scores = (3.0, 2.0, 1.0, 1.5, 1.6, 1.7)
    settings = {"keep_checkpoints": 1, "keep_best": 1}
    whole, stopped = make(EVERY, **settings), make(EVERY, **settings)
    train(whole, *scores)
    with sigterm_at(3):
        train(stopped, *scores[:2])
    # A crash after the validation that was due.
    with pytest.raises(StopIteration):
        train(stopped, scores[2])
    assert rows(stopped) == list(zip(range(1, 4), scores))
    # In the second step of the continued run, which is step 5.
    with sigterm_at(2):
        train(stopped, *scores[2:4])
    assert saved_steps(stopped) == [3, 5]
    train(stopped, *scores[4:])
    assert rows(stopped) == rows(whole) == list(zip(range(1, 7), scores))
    assert saved_steps(stopped) == saved_steps(whole) == [3, 6]
    assert named_best(stopped) == named_best(whole)


def test_patience_ends_the_run_and_a_continued_run_remembers_it(make, train, sigterm_at, capsys):
    scores = (3.0, 1.0, 2.0, 2.0)
    cfg, stopped = make(EVERY, patience=2), make(EVERY, patience=2)
    assert int(train(cfg, *scores).step) == 4
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence.startswith("stopped after step 4 by train.patience 2: ")
    assert sentence.endswith("the best a/loss is 1.0000, of step 2.")
    assert int(train(cfg).step) == 4, "the end is final"

    with sigterm_at(3):
        train(stopped, *scores)
    assert int(train(stopped, *scores[2:]).step) == 4
    assert rows(stopped) == rows(cfg)
    patient = replace(cfg, train=replace(cfg.train, patience=None))
    assert int(train(patient, 0.0, 0.0).step) == 6


def test_a_score_that_is_not_finite_ends_the_run_and_is_not_logged(make, train):
    cfg = make(EVERY)
    with pytest.raises(NonFiniteError, match="step 2: a/loss is nan"):
        train(cfg, 3.0, float("nan"))
    assert rows(cfg) == [(1, 3.0)]


def test_every_question_of_a_split_is_scored_once_in_batches_of_one_shape(make):
    cfg = make()
    cfg = replace(cfg, data=replace(cfg.validation_data("test[:7]"), text_length=40))
    tokenizer = pipeline.train_tokenizer(make())
    batches = list(pipeline.validation_batches(cfg, tokenizer))
    training = next(pipeline.training_iterator(cfg, tokenizer))
    for batch in batches:
        assert jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, training)
    records = pipeline.sources.load(cfg.data, "test[:7]")
    answers = [answer for record in records for answer in record.answers]
    expected = sum(len(text.answer_ids(tokenizer, answer)) for answer in answers)
    assert sum(batch.loss_weights.sum() for batch in batches) == expected
    halves = [list(pipeline.validation_batches(cfg, tokenizer, i, 2)) for i in range(2)]
    for batch, *shares in zip(batches, *halves, strict=True):
        for i, share in enumerate(shares):
            own = slice(4 * i, 4 * i + 4)
            assert np.array_equal(batch.tokens[own], share.tokens)
            assert np.array_equal(batch.images[own], share.images)


def test_every_conversation_is_scored_once(tmp_path):
    cfg = tiny(data=write_conversations(tmp_path, count=20))
    cfg = replace(cfg, data=cfg.validation_data("train[2:]"))
    tokenizer = pipeline.train_tokenizer(cfg)
    batches = list(pipeline.validation_batches(cfg, tokenizer))
    training = next(pipeline.training_iterator(cfg, tokenizer))
    for batch in batches:
        assert jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, training)
    source, _ = pipeline.training_conversations(cfg, tokenizer)
    answers = [turn for conversation in source for turn in conversation.turns[1::2]]
    expected = sum(len(text.answer_ids(tokenizer, answer)) for answer in answers)
    assert sum(batch.loss_weights.sum() for batch in batches) == expected


def test_questions_that_are_also_trained_on_are_counted(make, tmp_path):
    cfg = make()
    names = ("train[38:42]", "train[40:44]", "test[:4]")
    counts = overlap.count_overlaps(cfg.data, {name: cfg.validation_data(name) for name in names})
    records = pipeline.sources.load(cfg.data, "train[38:42]")
    sizes = [len(record.questions) for record in records]
    assert counts["train[38:42]"] == (sum(sizes[:2]), sum(sizes))
    assert counts["train[40:44]"].count == counts["test[:4]"].count == 0


def test_conversations_of_a_file_that_are_also_trained_on_are_counted(tmp_path):
    """Those of two files with other ids."""
    cfg = tiny(data=write_conversations(tmp_path, count=12))
    talks = json.loads((tmp_path / "talks.json").read_text())
    file = tmp_path / "mine.json"
    new = talks[4] | {"conversations": [dict(turn) for turn in talks[4]["conversations"]]}
    new["conversations"][0]["value"] += " and where?"
    file.write_text(json.dumps([talk | {"id": "x"} for talk in (*talks[6:9], new)]))
    cfg = replace(cfg, data=replace(cfg.data, train_split="train[:8]"))
    splits = {name: cfg.validation_data(name) for name in ("train[6:]", str(file))}
    counts = overlap.count_overlaps(cfg.data, splits)
    assert counts == {"train[6:]": (2, 6), str(file): (2, 4)}
    cfg = replace(cfg, eval=replace(cfg.eval, splits=(f"mine={file}",)))
    tokenizer = pipeline.train_tokenizer(cfg)
    assert pipeline.contents(cfg, tokenizer).keys() == {*cfg.data.files, str(file)}


def test_answers_are_generated_with_the_adapters_as_they_are_trained():
    cfg = tiny(lora=Lora(rank=2, alpha=8.0), eval=Eval(splits=("a=test",)))
    params, seen = random_params(cfg), []

    def answer(applied, examples, shown):
        seen.append(applied)
        return ["yes"]

    split = Split("a", None, [Question(0, "is it red?", "yes", "yes_no", list)])
    mesh = axes.make_mesh(Mesh())
    scorer = Scorer(cfg, SimpleNamespace(mesh=mesh), [split], SimpleNamespace(answer=answer))
    assert scorer._metrics(params, split) == {"exact_match": 1}
    unscaled = replace(cfg.lora, alpha=2.0)
    expected = lora.merge(cfg.lora, params)
    jax.tree.map(np.testing.assert_allclose, lora.merge(unscaled, seen[0]), expected)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("eval", {"every_steps": 2}, "eval.every_steps 2 needs a split"),
        ("eval", {"splits": ("a=test",)}, "eval.splits has no effect without validation"),
        ("train", {"patience": 2}, "train.patience has no effect without validation"),
        ("eval", {**EVERY, "splits": ("test[:6]",)}, "'test.:6.' is not NAME=SPLIT"),
        ("eval", {**EVERY, "splits": ("a=test", "a=train")}, "eval.splits names a twice"),
        ("eval", {**EVERY, "splits": ("train",)}, "has the name of the training's own metrics"),
        ("eval", {**EVERY, "splits": ("a=",)}, "'a=' is not NAME=SPLIT"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(make, section, fields, message):
    cfg = make()
    cfg = replace(cfg, **{section: replace(getattr(cfg, section), **fields)})
    with pytest.raises(ConfigError, match=message):
        validate(cfg)


def test_a_score_or_a_split_that_does_not_exist_is_refused_before_the_training(make):
    cfg = make(EVERY, best_metric="a/exact_mach")
    with pytest.raises(ConfigError, match="'a/exact_mach' .*perhaps you meant a/exact_match"):
        loop.train(cfg, prepare_scores)
    with pytest.raises(ConfigError, match="with eval.during_examples 0.*choose one of a/loss"):
        check_best_metric(replace(cfg, eval=replace(cfg.eval, during_examples=0)))
    cfg = make({**EVERY, "splits": ("a=tset",)})
    with pytest.raises(UserError, match="^eval.splits a=tset does not exist: choose train, test"):
        loop.train(cfg, prepare_scores)
    assert not Workdir(cfg.workdir).path.exists()


def test_the_loss_of_a_source_of_a_mixture_ranks_checkpoints(make):
    names = ("talks", "captions")
    data = Data(
        source="conversations", files=("a.json",), mixture=tuple(Source(name) for name in names)
    )
    cfg = make({**EVERY, "splits": ("a=train[:6]", "b=b.json")}, best_metric="a/loss/talks")
    cfg = replace(cfg, data=data, eval=replace(cfg.eval, during_examples=0))
    check_best_metric(cfg)
    with pytest.raises(ConfigError, match="choose one of a/loss, a/loss/talks, a/loss/captions, b"):
        check_best_metric(replace(cfg, train=replace(cfg.train, best_metric="b/loss/talks")))
    assert ScoreHistory("a/loss/talks", {1: 2.0, 2: 1.0, 3: 1.5}).best_step == 2
    validation = Validation(cfg, lambda params: {"a/loss": 1.0}, ScoreHistory("a/loss/talks"))
    with pytest.raises(ConfigError, match="no token of this source .* Choose one of a/loss"):
        validation.run(1, None)


@pytest.fixture
def services(monkeypatch):
    """Stand-ins for the packages of the trackers: a list of (name, arguments) of their calls."""
    calls = []

    def note(name, returned=None):
        def call(*arguments, **named):
            if name in failing:
                raise OSError("no network")
            calls.append((name, arguments, named))
            return returned

        return call

    failing = set()
    for package in trackers.TRACKERS:
        module = ModuleType(package)
        module.__spec__ = ModuleSpec(package, None, origin=package)
        methods = {name: note(f"{package}.{name}") for name in ("log", "finish")}
        module.init = note(f"{package}.init", SimpleNamespace(**methods))
        run = SimpleNamespace(info=SimpleNamespace(run_id="id of the server"))
        module.start_run = note(f"{package}.start_run", run)
        for name in ("set_experiment", "log_params", "log_metrics", "end_run"):
            setattr(module, name, note(f"{package}.{name}"))
        monkeypatch.setitem(sys.modules, package, module)
    return SimpleNamespace(calls=calls, failing=failing)


def test_trackers_get_the_rows_and_a_continued_run_is_the_same_there(
    make, train, services, sigterm_at
):
    cfg = make(EVERY, steps=2, trackers=tuple(trackers.TRACKERS))
    with sigterm_at(1):
        train(cfg)
    train(cfg, 3.0, 2.0)
    rows_of = {"wandb": "wandb.log", "mlflow": "mlflow.log_metrics", "trackio": "trackio.log"}
    for name in rows_of.values():
        written = [(call[2]["step"], call[1][0]) for call in services.calls if call[0] == name]
        assert [step for step, _ in written] == [1, 1, 2, 2]
        assert written[0][1]["train/loss"] == 1
        assert [values["a/loss"] for _, values in written if "a/loss" in values] == [3.0, 2.0]
    begun = [named for name, _, named in services.calls if name == "wandb.init"]
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["config"]["train.steps"] == 2
    begun = [named for name, _, named in services.calls if name == "trackio.init"]
    assert begun[0]["name"] == begun[1]["name"]
    begun = [named["run_id"] for name, _, named in services.calls if name == "mlflow.start_run"]
    assert begun == [None, "id of the server"]
    closed = [name for name, _, _ in services.calls if name in ("wandb.finish", "mlflow.end_run")]
    assert len(closed) == 4


@pytest.mark.parametrize("moment", ["wandb.init", "wandb.log", "wandb.finish"])
def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(
    moment, make, train, services, capsys
):
    services.failing.add(moment)
    cfg = make(EVERY, steps=2, trackers=("wandb", "mlflow"))
    train(cfg, 3.0, 2.0)
    assert rows(cfg) == [(1, 3.0), (2, 2.0)]
    assert capsys.readouterr().out.count("train.trackers wandb failed") == 1
    assert [name for name, _, _ in services.calls].count("mlflow.log_metrics") == 4


def test_an_unknown_tracker_is_refused_and_a_missing_package_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="'wandv' is not a tracker .perhaps you meant wandb"):
        trackers.check_trackers(["wandv"])
    for spec in (None, ModuleSpec("mlflow", None)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ConfigError, match="package mlflow: .*requirements-trackers.txt"):
            trackers.check_trackers(["mlflow"])
