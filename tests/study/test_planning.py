"""Which experiments a study runs, in which order, and when a folder is another study's."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.study import studies
from vlm_jax.config import ConfigError, UserError
from vlm_jax.study import changed, planning
from vlm_jax.study.definition import files, load
from vlm_jax.study.run.folder import (
    Folder,
    as_json,
    definition,
    differences,
)
from vlm_jax.testing import tiny

ROOT = Path(__file__).parents[2]


def plan(tmp_path, quick=False, seconds=None, **fields):
    return planning.plan(studies.study("data", **fields), tmp_path / "study", quick, seconds or {})


def test_the_first_seed_of_all_arms_comes_before_the_second_of_any(tmp_path):
    """The reference is the same experiment on both axes, and is run once."""
    assert [run.name for run in plan(tmp_path).runs()] == [
        "examples/linear/seed_0",
        "examples/shuffle/seed_0",
        "training_flops/shuffle/seed_0",
        "examples/linear/seed_1",
        "examples/shuffle/seed_1",
        "training_flops/shuffle/seed_1",
    ]


def test_a_run_is_the_base_with_its_differences_and_nothing_else(tmp_path):
    made = plan(tmp_path).run("examples", "shuffle", 1)
    expected = changed(studies.base("data"), {"projector.kind": "pixel_shuffle", "seed": 1})
    assert made.cfg == dataclasses.replace(
        expected, workdir=str(tmp_path / "study/examples/shuffle/seed_1")
    )


def test_a_matched_arm_takes_the_steps_that_fit(tmp_path):
    made = plan(tmp_path)
    match = next(
        one for one in made.matches if (one.axis, one.arm) == ("training_flops", "shuffle")
    )
    assert match.number == made.arms["training_flops", "shuffle"].train.steps > 6
    assert abs(match.residual) <= 0.1


def test_quick_overrides_arms_and_asks_for_no_fine_match(tmp_path):
    made = plan(tmp_path, quick=True, tolerance=0.0)
    assert made.arms["examples", "linear"].train.steps == 2


def test_seconds_are_matched_by_the_measured_step(tmp_path):
    matched = {"seconds": "train.steps"}
    made = plan(tmp_path, seconds={"linear": 0.1, "shuffle": 0.05}, matched=matched)
    assert made.arms["seconds", "shuffle"].train.steps == 12
    with pytest.raises(UserError, match="measured: run the study first"):
        plan(tmp_path, matched=matched)


def test_a_placeholder_is_the_exported_folder(tmp_path):
    first = {"text": {"fusion.kind": "text_only"}}
    arms = {"new": {}, "taught": {"decoder.checkpoint": "{text}"}}
    made = plan(tmp_path, first=first, arms=arms, reference="new", matched={"examples": ""})
    assert made.arms["examples", "taught"].decoder.checkpoint == str(
        tmp_path / "study/first/text_exported"
    )
    assert made.first["text"].fusion.kind == "text_only"
    assert made.first["text"].workdir == str(tmp_path / "study/first/text")


def test_an_arm_has_the_size_of_what_it_builds_on(tmp_path):
    """Its config says nothing of that: the checkpoint decides."""
    first = {"text": {"fusion.kind": "text_only", "decoder.depth": 4}}
    arms = {"new": {"decoder.depth": 4}, "taught": {"decoder.checkpoint": "{text}"}}
    made = plan(tmp_path, first=first, arms=arms, reference="new", matched={"parameters": ""})
    assert [match.residual for match in made.matches] == [0.0, 0.0]
    assert made.built(made.arms["parameters", "taught"]).decoder.depth == 4


def test_arms_that_differ_in_what_a_checkpoint_decides_are_equal(tmp_path):
    first = {"text": {"fusion.kind": "text_only"}, "other": {"fusion.kind": "text_only"}}
    taught = {"decoder.checkpoint": "{text}"}
    arms = {"a": taught, "b": {"decoder.checkpoint": "{other}"}}
    settings = {"first": first, "reference": "a", "matched": {"examples": ""}}
    plan(tmp_path, arms=arms, **settings)
    with pytest.raises(UserError, match="arms a and c are the same experiment"):
        plan(tmp_path, arms=arms | {"c": taught | {"decoder.depth": 4}}, **settings)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_shares_are_all_runs_and_the_seeds_of_an_arm_are_in_different_ones(tmp_path, count):
    runs = plan(tmp_path, seeds=3).runs()
    shares = [planning.share(runs, number, count) for number in range(1, count + 1)]
    assert sorted(run.name for share in shares for run in share) == sorted(run.name for run in runs)
    assert max(map(len, shares)) - min(map(len, shares)) <= 3
    places = {run.seed: i for i, share in enumerate(shares) for run in share if run.arm == "linear"}
    assert len(set(places.values())) == min(3, count)


def test_equal_arms_are_refused_by_their_names(tmp_path):
    with pytest.raises(UserError, match="arms linear and same are the same experiment"):
        plan(tmp_path, arms={"linear": {}, "same": {"projector.kind": "linear"}})


def test_models_that_differ_in_steps_alone_are_measured_once(tmp_path):
    assert list(plan(tmp_path).models()) == ["linear", "shuffle"]
    widths = plan(tmp_path, matched={"examples": "", "parameters": "decoder.mlp_width"})
    assert list(widths.models()) == ["linear", "shuffle", "linear_parameters", "shuffle_parameters"]


def test_a_folder_takes_more_seeds_and_arms_and_no_other_version(tmp_path):
    place = Folder(tmp_path / "study")
    place.open(plan(tmp_path))
    before = place.definition.read_text()
    wider = {
        "linear": {},
        "shuffle": {"projector.kind": "pixel_shuffle"},
        "mlp": {"projector.kind": "mlp"},
    }
    place.check(plan(tmp_path, seeds=5, arms=wider))
    other = changed(studies.base("data"), {"optim.learning_rate": 0.5})
    with pytest.raises(
        ConfigError, match=r"another version .*\n.*linear: optim.learning_rate: 0.001 -> 0.5"
    ):
        place.open(plan(tmp_path, base=other))
    with pytest.raises(UserError, match="examples/shuffle: is gone"):
        place.open(plan(tmp_path, arms={"linear": {}, "mlp": {"projector.kind": "mlp"}}))
    assert place.definition.read_text() == before


def test_a_folder_keeps_its_seeds(tmp_path):
    """Fewer are run again; all that are there are reported."""
    place = Folder(tmp_path / "study")
    assert place.seeds() == 0
    for seeds in (5, 2):
        place.open(plan(tmp_path, seeds=seeds))
        assert place.seeds() == 5


def test_another_seed_of_the_base_is_another_version(tmp_path):
    place = Folder(tmp_path / "study")
    place.open(plan(tmp_path))
    with pytest.raises(UserError, match="linear: seed: 0 -> 1000"):
        place.check(plan(tmp_path, base=changed(studies.base("data"), {"seed": 1000})))


def test_a_field_that_only_a_later_program_has_is_its_default():
    new = as_json(tiny())
    old = {name: value for name, value in new.items() if name != "decoder.unroll"}
    assert differences(old, new) == []
    assert differences(old, new | {"decoder.unroll": 2}) == ["decoder.unroll: 1 -> 2"]


def test_how_a_step_is_computed_is_a_matter_of_the_study(tmp_path):
    """It changes what an arm costs."""
    changed_cfg = changed(studies.base("data"), {"train.microbatches": 2})
    assert "train.microbatches" in as_json(changed_cfg)


def test_where_data_lies_is_no_matter_of_the_study(tmp_path):
    found = json.dumps(definition(plan(tmp_path)))
    moved = planning.plan(studies.study("elsewhere"), tmp_path / "other", False, {})
    assert json.dumps(definition(moved)) == found


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("file", files(ROOT / "experiments"), ids=lambda file: file.stem)
def test_a_study_that_is_here_can_be_planned(file, quick, tmp_path):
    made = planning.plan(load(str(file)), tmp_path, quick, {})
    assert made.runs()
