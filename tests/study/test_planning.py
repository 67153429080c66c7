"""The experiments of a study, their order, and the check of its folder."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.study import studies
from vlm_jax.config import ConfigError, Optim, UserError
from vlm_jax.nn.models import abstract_params
from vlm_jax.study import override, planning, tuning
from vlm_jax.study.definition import load, study_files
from vlm_jax.study.run.folder import (
    Folder,
    as_json,
    definition,
    diff,
)
from vlm_jax.testing import tiny

ROOT = Path(__file__).parents[2]


def plan(tmp_path, quick=False, seconds=None, **fields):
    return planning.build_plan(
        studies.study("data", **fields), tmp_path / "study", quick, seconds or {}
    )


def test_the_first_seed_of_all_arms_precedes_the_second_of_any(tmp_path):
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
    study_plan = plan(tmp_path).run("examples", "shuffle", 1)
    expected = override(studies.base("data"), {"projector.kind": "pixel_shuffle", "seed": 1})
    assert study_plan.cfg == dataclasses.replace(
        expected, workdir=str(tmp_path / "study/examples/shuffle/seed_1")
    )


def test_a_matched_arm_takes_the_steps_that_fit(tmp_path):
    study_plan = plan(tmp_path)
    match = next(
        match
        for match in study_plan.matches
        if (match.axis, match.arm) == ("training_flops", "shuffle")
    )
    assert match.number == study_plan.arms["training_flops", "shuffle"].train.steps > 6
    assert abs(match.residual) <= 0.1


def test_quick_overrides_arms_and_asks_for_no_fine_match(tmp_path):
    study_plan = plan(tmp_path, quick=True, tolerance=0.0)
    assert study_plan.arms["examples", "linear"].train.steps == 2


def test_seconds_are_matched_by_the_measured_step(tmp_path):
    matched = {"seconds": "train.steps"}
    study_plan = plan(tmp_path, seconds={"linear": 0.1, "shuffle": 0.05}, matched=matched)
    assert study_plan.arms["seconds", "shuffle"].train.steps == 12
    with pytest.raises(UserError, match="only after a step of every arm is measured"):
        plan(tmp_path, matched=matched)


TEXT_ONLY = {"fusion.kind": "text_only"}
TAUGHT = {"decoder.checkpoint": "{text}"}


def test_every_seed_has_its_own_prerequisites(tmp_path):
    """Seeds take the versions of one in turn, and their arms share them."""
    first = {"text": TEXT_ONLY, "eye": [{"train.steps": 7}, {"train.steps": 8}]}
    taught = TAUGHT | {"vision.checkpoint": "{eye}"}
    study_plan = plan(
        tmp_path,
        prerequisites=first,
        arms={"new": {}, "taught": taught, "other": taught | {"projector.kind": "mlp"}},
        reference="new",
        matched={"examples": None},
        seeds=3,
    )
    runs = study_plan.prerequisites_of(study_plan.runs())
    assert [run.name for run in runs] == [
        f"first/{name}/seed_{seed}" for seed in range(3) for name in ("text", "eye")
    ]
    assert [run.cfg.train.steps for run in runs if run.arm == "eye"] == [7, 8, 7]
    assert [run.cfg.seed for run in runs] == [0, 0, 1, 1, 2, 2]
    assert runs[0].cfg.fusion.kind == "text_only"
    for seed in range(3):
        for arm in ("taught", "other"):
            cfg = study_plan.run("examples", arm, seed).cfg
            assert cfg.decoder.checkpoint == str(tmp_path / f"study/first/text/seed_{seed}")
            assert cfg.vision.checkpoint == str(tmp_path / f"study/first/eye/seed_{seed}")


def test_an_arm_has_the_size_of_its_prerequisites(tmp_path):
    """The checkpoints decide, not the arm's config."""
    sizes = {"decoder.depth": 4, "vision.mlp_width": 96}
    study_plan = plan(
        tmp_path,
        prerequisites={"both": sizes},
        arms={
            "new": sizes,
            "taught": {"decoder.checkpoint": "{both}", "vision.checkpoint": "{both}"},
        },
        reference="new",
        matched={"parameters": None},
    )
    assert [match.residual for match in study_plan.matches] == [0.0, 0.0]
    resolved = study_plan.resolve(study_plan.arms["parameters", "taught"])
    assert (resolved.decoder.depth, resolved.vision.mlp_width) == (4, 96)


def test_arms_that_differ_in_fields_of_a_checkpoint_are_equal(tmp_path):
    arms = {"a": TAUGHT, "b": {}}
    settings = {
        "prerequisites": {"text": TEXT_ONLY},
        "reference": "a",
        "matched": {"examples": None},
    }
    plan(tmp_path, arms=arms, **settings)
    with pytest.raises(UserError, match="arms a and c are identical after matching examples"):
        plan(tmp_path, arms=arms | {"c": TAUGHT | {"decoder.depth": 4}}, **settings)


def test_a_probe_starts_from_the_run_and_keeps_all_but_its_questions(tmp_path):
    study_plan = plan(tmp_path, probes={"text": TEXT_ONLY | {"data.seed": 1}})
    (run, *_), (probe,) = study_plan.runs(), study_plan.probes
    folder = run.probe_folder("text")
    assert folder == tmp_path / "study/examples/linear/seed_0/probes/text"
    asked = planning.probe_experiment(run.cfg, probe, folder)
    assert (asked.decoder.checkpoint, asked.vision.checkpoint) == (run.cfg.workdir, "")
    expected = override(run.cfg, dict(probe.overrides) | {"workdir": str(folder)})
    assert override(asked, {"decoder.checkpoint": ""}) == dataclasses.replace(
        expected, optim=Optim()
    )


def test_another_probe_of_the_same_name_is_another_version(tmp_path):
    folder = Folder(tmp_path / "study")
    folder.open(plan(tmp_path, probes={"text": TEXT_ONLY}))
    folder.check(plan(tmp_path, probes={"text": TEXT_ONLY, "more": {"data.seed": 1}}))
    with pytest.raises(UserError, match="probe text: "):
        folder.check(plan(tmp_path, probes={"text": TEXT_ONLY | {"data.seed": 1}}))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_shards_hold_all_runs_and_separate_the_seeds_of_an_arm(tmp_path, count):
    runs = plan(tmp_path, seeds=3).runs()
    shards = [planning.shard(runs, index, count) for index in range(1, count + 1)]
    sharded = [run for shard in shards for run in shard]
    assert sorted(run.name for run in sharded) == sorted(run.name for run in runs)
    assert max(map(len, shards)) - min(map(len, shards)) <= 3
    with_linear = [shard for shard in shards if any(run.arm == "linear" for run in shard)]
    assert len(with_linear) == min(3, count)


def test_equal_arms_are_refused_by_their_names(tmp_path):
    with pytest.raises(UserError, match="arms linear and same are identical"):
        plan(tmp_path, arms={"linear": {}, "same": {"projector.kind": "linear"}})


def test_models_that_differ_only_in_steps_are_measured_once(tmp_path):
    assert list(plan(tmp_path).models()) == ["linear", "shuffle"]
    matched = {"training_flops": "train.steps", "examples": "train.batch_size"}
    models = plan(tmp_path, matched=matched).models()
    assert list(models) == ["linear", "shuffle", "linear_examples", "shuffle_examples"]


def test_a_folder_accepts_more_seeds_and_arms_but_no_other_version(tmp_path):
    folder = Folder(tmp_path / "study")
    folder.open(plan(tmp_path))
    before = folder.definition.read_text()
    wider = {
        "linear": {},
        "shuffle": {"projector.kind": "pixel_shuffle"},
        "mlp": {"projector.kind": "mlp"},
    }
    folder.check(plan(tmp_path, seeds=5, arms=wider))
    other = override(studies.base("data"), {"optim.learning_rate": 0.5})
    with pytest.raises(
        ConfigError, match=r"another version .*\n.*linear: optim.learning_rate: 0.001 -> 0.5"
    ):
        folder.open(plan(tmp_path, base=other))
    with pytest.raises(UserError, match="examples/shuffle: is gone"):
        folder.open(plan(tmp_path, arms={"linear": {}, "mlp": {"projector.kind": "mlp"}}))
    assert folder.definition.read_text() == before


def test_a_folder_keeps_its_seeds(tmp_path):
    """A later command may run fewer; all are reported."""
    folder = Folder(tmp_path / "study")
    assert folder.seeds() == 0
    for seeds in (5, 2):
        folder.open(plan(tmp_path, seeds=seeds))
        assert folder.seeds() == 5


def test_another_seed_of_the_base_is_another_version(tmp_path):
    folder = Folder(tmp_path / "study")
    folder.open(plan(tmp_path))
    with pytest.raises(UserError, match="linear: seed: 0 -> 1000"):
        folder.check(plan(tmp_path, base=override(studies.base("data"), {"seed": 1000})))


def test_a_missing_field_counts_as_its_default():
    new = as_json(tiny())
    old = {name: value for name, value in new.items() if name != "decoder.unroll"}
    assert diff(old, new) == []
    assert diff(old, new | {"decoder.unroll": 2}) == ["decoder.unroll: 1 -> 2"]


def test_a_folder_of_an_earlier_version_continues(tmp_path):
    folder = Folder(tmp_path / "study")
    folder.open(plan(tmp_path))
    values = json.loads(folder.definition.read_text())
    for fields in values["experiments"].values():
        fields |= {"decoder.query_scale": 0.0, "decoder.rope.local_theta": 0.0, "data.bos_id": -1}
        fields["decoder.norm_order"] = fields.pop("decoder.norm_position")
    folder.definition.write_text(json.dumps(values))
    folder.check(plan(tmp_path))


def test_microbatches_define_a_study(tmp_path):
    """They change the costs of an arm."""
    changed_cfg = override(studies.base("data"), {"train.microbatches": 2})
    assert "train.microbatches" in as_json(changed_cfg)


def test_folders_do_not_define_a_study(tmp_path):
    here = json.dumps(definition(plan(tmp_path)))
    moved = planning.build_plan(studies.study("elsewhere"), tmp_path / "other", False, {})
    assert json.dumps(definition(moved)) == here


STUDIES = study_files(ROOT / "experiments")
every_study = pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@every_study
def test_every_study_of_experiments_can_be_planned(file, quick, tmp_path):
    study_plan = planning.build_plan(load(str(file)), tmp_path, quick, {})
    assert study_plan.runs()


@pytest.mark.parametrize(
    "file", study_files(ROOT / "experiments/2026_11"), ids=lambda file: file.stem
)
def test_the_arms_of_a_superseded_study_are_still_valid(file):
    assert planning.unmatched_arms(load(str(file)), True)


@every_study
def test_the_models_and_the_sweep_of_every_study_can_be_built(file, tmp_path):
    study = load(str(file))
    study_plan = planning.build_plan(study, tmp_path, False, {})
    for cfg in study_plan.models().values():
        assert abstract_params(study_plan.resolve(cfg))
    if study.tune:
        assert study.tune.keys() == study.arms.keys()
        sweep = planning.build_plan(tuning.sweep_study(study), tmp_path, False, {})
        assert len(sweep.runs()) == sum(map(len, study.tune.values()))


def test_studies_of_a_dataset_share_their_prerequisites(tmp_path):
    """A study takes over finished prerequisites of another (`preparing.reuse_finished`)."""
    first: dict[tuple[str, str], set] = {}
    for study in (load(str(file)) for file in STUDIES):
        study_plan = planning.build_plan(study, tmp_path, False, {})
        for name, versions in study_plan.prerequisites.items():
            fields = json.dumps([as_json(version) for version in versions])
            first.setdefault((study.base.data.source, name), set()).add(fields)
    assert len(first) == 4, "two parts for each of two datasets"
    assert all(len(experiments) == 1 for experiments in first.values())


def test_final_numbers_are_of_a_split_that_no_choice_has_seen():
    for study in (load(str(file)) for file in STUDIES):
        if study.contrasts:
            data = study.base.data
            assert (data.fold, study.base.eval.split) == (1, "test")
            assert study.metric == "nats" and "exact_match" in study.base.eval.metrics
            assert study.seeds >= 5
            first = [version for name in study.prerequisites for version in study.versions(name)]
            seeds = {data.seed, *(version["data.seed"] for version in first)}
            assert len(seeds) == 2 and 0 not in seeds
