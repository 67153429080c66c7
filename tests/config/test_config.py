"""An experiment is data: it comes back equal from JSON, and a field is changed by name."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from vlm_jax.config import (
    ConfigError,
    Data,
    Experiment,
    Fusion,
    LrMult,
    Mesh,
    Optim,
    Vision,
    files,
)
from vlm_jax.config.validate import flat, validate, with_fields
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import KINDS, tiny

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.py"))
named = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def load(name) -> Experiment:
    return files.load(str(FOLDER / f"{name}.py"))


# Files


@named
def test_a_config_loads_validates_and_names_its_work_folder(path):
    cfg = validate(files.load(str(path)))
    assert cfg.workdir == f"runs/{path.parent.name}_{path.stem}"


@named
def test_a_config_comes_back_equal_from_json(path):
    cfg = files.load(str(path))
    assert files.from_json(files.to_json(cfg), "text") == cfg


def test_every_kind_of_value_comes_back_equal_from_json():
    cfg = replace(
        tiny("cross_attention", fusion=Fusion("cross_attention", cross_layers=(0, 1), gated=False)),
        data=Data(augment=("mirror", "turn")),
        vision=Vision(tile_layouts=((1, 1), (1, 2))),
        optim=Optim(lr_mult=LrMult(vision=0.0), learning_rate=1 / 3),
        seed=7,
        workdir="a folder/ü",
    )
    again = files.from_json(files.to_json(cfg), "text")
    assert again == cfg
    assert hash(again) == hash(
        cfg
    )  # lists would not hash, and a config is a static argument of jit


STYLES = {
    "easy_vqa/cross_attention": {"fusion.kind"},
    "easy_vqa/encoder_decoder": {"fusion.kind"},
    "easy_vqa/encoder_free": {"vision.kind", "vision.newline_token", "projector.kind"},
}


def test_the_hybrid_on_glyphs_differs_in_fusion_and_in_the_size_of_its_pages():
    lines = files.differences(load("synthetic/glyphs_unified"), load("synthetic/glyphs_hybrid"))
    larger = {"data.image_px", "vision.tiles", "data.text_length", "eval.max_new_tokens"}
    assert {line.split(":")[0] for line in lines} == {"fusion.kind", *larger}


@pytest.mark.parametrize("name", STYLES)
def test_the_fusion_styles_of_easy_vqa_differ_in_the_fusion_alone(name):
    lines = files.differences(load("easy_vqa/unified"), load(name))
    assert {line.split(":")[0] for line in lines} == STYLES[name]


def test_differences_are_lines_with_both_values_and_leave_out_the_work_folder():
    a = tiny()
    fusion, optim = replace(a.fusion, kind="cross_attention"), replace(a.optim, learning_rate=0.5)
    b = replace(a, fusion=fusion, optim=optim, workdir="elsewhere")
    assert files.differences(a, b) == [
        "fusion.kind: unified -> cross_attention",
        "optim.learning_rate: 0.001 -> 0.5",
    ]
    assert files.differences(a, replace(a, workdir="elsewhere")) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Expecting value"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("[" * 100_000, "recursion"),
        ("{}", "missing or unknown"),
        ('{"typo": 1}', "typo"),
        ("3", "not the config of a run"),
        (b"\xff\xfe\x00", "not the config of a run"),
        (b"\x1f\x8b\x08", "not the config of a run: it is not a text file"),
    ],
)
def test_json_that_is_no_experiment_is_refused_with_the_name_of_the_file(text, message):
    with pytest.raises(ConfigError, match=f"(?s)some/config.json .*{message}"):
        files.from_json(text, "some/config.json")


def test_a_field_that_only_a_later_version_has_is_its_default():
    cfg = tiny(projector=replace(tiny().projector, kind="mlp"))
    values = json.loads(files.to_json(cfg))
    del values["projector"]["checkpoint"]
    assert files.from_json(json.dumps(values), "config.json") == cfg
    values["projector"]["gone"] = 1
    with pytest.raises(ConfigError, match="the fields \\['gone'\\] of Projector"):
        files.from_json(json.dumps(values), "config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_made_with_the_defaults_of_old_keeps_its_model_and_continues(kind, tmp_path):
    """Its config.json has gates and no qk_norm, or lacks qk_norm altogether."""
    cfg = tiny(kind)
    values = json.loads(files.to_json(cfg))
    values["fusion"] |= {"gated": True, "qk_norm": False}
    old = files.from_json(json.dumps(values), "config.json")
    assert old.fusion.has_gates == cfg.fusion.has_cross_blocks
    assert not (old.fusion.image_in_memory and old.fusion.qk_norm)
    assert validate(old) == old
    del values["fusion"]["qk_norm"]
    assert files.from_json(json.dumps(values), "config.json") == old
    workdir = Workdir(str(tmp_path))
    workdir.config.write_text(json.dumps(values))
    workdir.check(old)
    if not cfg.fusion.image_in_memory:
        workdir.check(cfg)  # the same model, so that the same command continues it


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("def get_config(): exit('enough')", "SystemExit: enough"),
        ("import no_such_module", "no_such_module"),
        ("def get_config(): return 3", "must return an Experiment, not int"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_name(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"broken.py.*{message}"):
        files.load(str(path))


def test_the_config_of_a_public_checkpoint_is_no_run():
    with pytest.raises(
        ConfigError,
        match="some/config.json belongs to a public checkpoint, not to a run: .* --checkpoint",
    ):
        files.from_json('{"model_type": "llama", "hidden_size": 32}', "some/config.json")


def test_a_missing_config_names_the_nearest_file(tmp_path):
    (tmp_path / "easy_vqa.py").write_text("")
    with pytest.raises(ConfigError, match=r"does not exist \(perhaps you meant .*easy_vqa.py\)"):
        files.load(str(tmp_path / "easy_vga.py"))


# Derived values


def test_an_experiment_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        tiny().seed = 1


def test_derived_values_follow_an_override():
    cfg = files.override(tiny(), ["--vision.patch-size-px", "4", "--decoder.width", "48"], "test")
    assert tiny().image_tokens == 4
    assert cfg.image_tokens == 16
    assert cfg.vision.grid == (4, 4)
    assert cfg.vision.patch_dim == 48
    assert cfg.decoder.head_width == 12
    assert cfg.row_length == 16 + 24


@pytest.mark.parametrize(
    "kind, newline, slots",
    [("unified", False, 4), ("unified", True, 6), ("cross_attention", False, 0)],
)
def test_a_row_has_room_for_the_image_tokens_that_stand_in_it(kind, newline, slots):
    cfg = tiny(kind, vision=replace(tiny().vision, newline_token=newline))
    assert cfg.image_slots_in_row == slots
    assert cfg.row_length == slots + cfg.data.text_length


def test_overrides_are_typed():
    arguments = [
        "--fusion.kind",
        "cross_attention",
        "--fusion.cross-layers",
        "0",
        "1",
        "--optim.learning_rate",
        "1e-4",
    ]
    arguments += ["--vision.tile-layouts", "1", "1", "1", "2"]
    cfg = files.override(tiny(), arguments, "test")
    cfg = files.override(cfg, ["--eval.split", "", "--data.files", "a.json", "b.json"], "test")
    assert (cfg.eval.split, cfg.data.files) == ("", ("a.json", "b.json"))
    assert cfg.fusion == Fusion("cross_attention", cross_layers=(0, 1))
    assert cfg.optim.learning_rate == 1e-4
    assert cfg.vision.tile_layouts == ((1, 1), (1, 2))


def test_a_field_that_may_be_empty_is_emptied():
    for field in files.MAY_BE_EMPTY:
        assert flat(files.override(Experiment(), [f"--{field}", ""], "test"))[field] == ""


def test_tuples_of_every_form_are_read():
    arguments = [
        "--data.special-ids",
        "3",
        "2",
        "1",
        "0",
        "--vision.tile-layouts",
        "1",
        "1",
        "2",
        "1",
    ]
    arguments += ["--fusion.cross-layers", "--vision.checkpoint", ""]
    cfg = files.override(tiny(), arguments, "test")
    assert cfg.data.special_ids == (3, 2, 1, 0)
    assert cfg.vision.tile_layouts == ((1, 1), (2, 1))
    assert cfg.fusion.cross_layers == ()
    assert cfg.vision.checkpoint == ""


@pytest.mark.parametrize("kind", KINDS)
def test_another_fusion_is_one_word_on_the_command_line(kind):
    cfg = files.override(load("easy_vqa/cross_attention"), ["--fusion.kind", kind], "test")
    assert validate(cfg).fusion == Fusion(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiny_experiment_is_valid_and_comes_back_as_it_came(kind):
    cfg = tiny(kind)
    assert validate(cfg) is cfg


@pytest.mark.parametrize(
    "devices, mesh, sizes",
    [(8, Mesh(), (8, 1, 1)), (8, Mesh(2, -1, 2), (2, 2, 2)), (1, Mesh(), (1, 1, 1))],
)
def test_what_is_left_of_the_devices_goes_to_the_axis_of_minus_one(devices, mesh, sizes):
    assert mesh.sizes(devices) == sizes


def test_the_grid_of_a_projector_is_the_one_that_its_tokens_stand_in():
    vision = Vision(image_size_px=32, patch_size_px=8)
    projector = tiny().projector
    assert projector.output_grid(vision) == (4, 4)
    assert replace(projector, kind="average_pool").output_grid(vision) == (2, 2)
    assert replace(projector, kind="resampler").output_grid(vision) == (1, 3)
    kept = replace(vision, class_token=True, keep_class_token=True)
    assert projector.output_grid(kept) == (1, 17)


@pytest.mark.parametrize(
    "arguments, field",
    [
        (["--data.files", "a.json", "--seed", "1", "--data.files", "b.json"], "data.files"),
        (["--train.batch_size=1", "--train.batch-size", "1"], "train.batch_size"),
    ],
)
def test_an_option_given_twice_is_refused(arguments, field):
    with pytest.raises(ConfigError, match=f"--{field} is given twice: give all values after one"):
        files.override(tiny(), arguments, "run.py")


# Numbers that meant None in earlier versions.
OLD_NONE = {
    "vision.kv_heads": 0,
    "vision.head_dim": 0,
    "vision.query_scale": 0.0,
    "vision.score_softcap": 0.0,
    "decoder.kv_heads": 0,
    "decoder.head_dim": 0,
    "decoder.query_scale": 0.0,
    "decoder.score_softcap": 0.0,
    "vision.resize_px": 0,
    "vision.classes": 0,
    "decoder.rope.local_theta": 0.0,
    "decoder.sliding_window": 0,
    "decoder.logit_softcap": 0.0,
    "data.cell_px": 0,
    "data.bos_id": -1,
    "train.loss_chunk": 0,
    "train.keep_every_steps": 0,
    "distributed.num_processes": 0,
    "distributed.process_id": -1,
    "eval.max_examples": 0,
}


def test_none_is_an_option_and_null_in_json():
    cfg = with_fields(tiny(), dict.fromkeys(OLD_NONE, 7))
    cfg = files.override(cfg, [f"--{field}=None" for field in OLD_NONE], "run.py")
    assert {flat(cfg)[field] for field in OLD_NONE} == {None}
    assert json.loads(files.to_json(cfg))["decoder"]["rope"]["local_theta"] is None
    assert files.from_json(files.to_json(cfg), "config.json") == validate(cfg)
    with pytest.raises(ConfigError, match="--train.steps None is not a whole number"):
        files.override(cfg, ["--train.steps", "None"], "run.py")


def test_the_numbers_of_earlier_versions_mean_none():
    cfg = with_fields(tiny(), dict.fromkeys(OLD_NONE))
    old = files.to_json(with_fields(cfg, OLD_NONE))
    assert files.from_json(old, "config.json") == cfg
    assert files.updated(flat(cfg) | OLD_NONE) == flat(cfg)
