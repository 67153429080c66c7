"""An experiment is data: it comes back equal from JSON, and what cannot work is refused by name."""

import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from vlm_jax import config_file
from vlm_jax.config import ConfigError, Data, Experiment, Fusion, Mesh, Optim, RateScale, Rope, Vision
from vlm_jax.limits import ABOVE, AT_LEAST, AT_MOST, BELOW
from vlm_jax.testing import KINDS, tiny
from vlm_jax.validate import kinds, validate

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
named = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def load(name) -> Experiment:
    return config_file.load(str(CONFIGS[0].parent / f"{name}.py"))


def changed(cfg: Experiment, **values) -> Experiment:
    """`section_field=value`, the section up to the first underscore."""
    for name, value in values.items():
        section, field = name.split("_", 1)
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{field: value})})
    return cfg


# Files


@named
def test_a_config_loads_validates_and_names_its_work_folder(path):
    cfg = validate(config_file.load(str(path)))
    assert cfg.workdir == f"runs/{path.stem}"


@named
def test_a_config_comes_back_equal_from_json(path):
    cfg = config_file.load(str(path))
    assert config_file.from_json(config_file.to_json(cfg), "text") == cfg


def test_every_kind_of_value_comes_back_equal_from_json():
    cfg = replace(
        tiny("cross_attention", fusion=Fusion("cross_attention", cross_layers=(0, 1), gated=False)),
        data=Data(augment=("mirror", "turn")),
        vision=Vision(tile_layouts=((1, 1), (1, 2))),
        optim=Optim(rate_scale=RateScale(vision=0.0), learning_rate=1 / 3),
        seed=7,
        workdir="a folder/ü",
    )
    again = config_file.from_json(config_file.to_json(cfg), "text")
    assert again == cfg
    assert hash(again) == hash(cfg)  # lists would not hash, and a config is a static argument of jit


STYLES = {
    "easy_vqa_cross_attention": {"fusion.kind"},
    "easy_vqa_encoder_decoder": {"fusion.kind"},
    "easy_vqa_encoder_free": {"vision.kind", "vision.newline_token", "projector.kind"},
}


def test_the_hybrid_on_glyphs_differs_in_its_fusion_and_in_the_size_of_its_pages():
    lines = config_file.differences(load("glyphs_unified"), load("glyphs_hybrid"))
    assert {line.split(":")[0] for line in lines} == {"fusion.kind", "data.image_px", "vision.tiles"}


@pytest.mark.parametrize("name", STYLES)
def test_the_fusion_styles_of_easy_vqa_differ_in_the_fusion_alone(name):
    lines = config_file.differences(load("easy_vqa_unified"), load(name))
    assert {line.split(":")[0] for line in lines} == STYLES[name]


def test_differences_are_lines_with_both_values_and_leave_out_the_work_folder():
    a = tiny()
    b = replace(changed(a, fusion_kind="cross_attention", optim_learning_rate=0.5), workdir="elsewhere")
    assert config_file.differences(a, b) == [
        "fusion.kind: unified -> cross_attention",
        "optim.learning_rate: 0.001 -> 0.5",
    ]
    assert config_file.differences(a, replace(a, workdir="elsewhere")) == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "Expecting value"),
        ("[]", "missing or unknown"),
        ("{}", "missing or unknown"),
        ('{"typo": 1}', "typo"),
        ("3", "not the config of a run"),
        (b"\xff\xfe\x00", "not the config of a run"),
    ],
)
def test_json_that_is_no_experiment_is_refused_with_the_name_of_the_file(text, said):
    with pytest.raises(ConfigError, match=f"(?s)some/config.json .*{said}"):
        config_file.from_json(text, "some/config.json")


@pytest.mark.parametrize(
    "text, said",
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("def get_config(): exit('enough')", "SystemExit: enough"),
        ("import no_such_module", "no_such_module"),
        ("def get_config(): return 3", "must return an Experiment, not int"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_name(tmp_path, text, said):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"broken.py.*{said}"):
        config_file.load(str(path))


def test_the_config_of_a_public_checkpoint_is_no_run():
    with pytest.raises(ConfigError, match="some/config.json is of a public checkpoint, not of a run: --checkpoint"):
        config_file.from_json('{"model_type": "llama", "hidden_size": 32}', "some/config.json")


def test_a_missing_config_names_the_nearest_file(tmp_path):
    (tmp_path / "easy_vqa.py").write_text("")
    with pytest.raises(ConfigError, match=r"does not exist \(perhaps you meant .*easy_vqa.py\)"):
        config_file.load(str(tmp_path / "easy_vga.py"))


# Derived values


def test_an_experiment_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        tiny().seed = 1


def test_derived_values_follow_an_override():
    cfg = config_file.override(tiny(), ["--vision.patch-size-px", "4", "--decoder.width", "48"], "test")
    assert tiny().image_tokens == 4
    assert cfg.image_tokens == 16
    assert cfg.vision.grid == (4, 4)
    assert cfg.vision.patch_dim == 48
    assert cfg.decoder.head_width == 12
    assert cfg.row_length == 16 + 24


@pytest.mark.parametrize(
    "kind, newline, slots", [("unified", False, 4), ("unified", True, 6), ("cross_attention", False, 0)]
)
def test_a_row_has_room_for_the_image_tokens_that_stand_in_it(kind, newline, slots):
    cfg = changed(tiny(kind), vision_newline_token=newline)
    assert cfg.image_slots_in_row == slots
    assert cfg.row_length == slots + cfg.data.text_length


def test_overrides_are_typed():
    arguments = ["--fusion.kind", "cross_attention", "--fusion.cross-layers", "0", "1", "--optim.learning_rate", "1e-4"]
    arguments += ["--vision.tile-layouts", "1", "1", "1", "2"]
    cfg = config_file.override(tiny(), arguments, "test")
    cfg = config_file.override(cfg, ["--eval.split", "", "--data.files", "a.json", "b.json"], "test")
    assert (cfg.eval.split, cfg.data.files) == ("", ("a.json", "b.json"))
    assert cfg.fusion == Fusion("cross_attention", cross_layers=(0, 1))
    assert cfg.optim.learning_rate == 1e-4
    assert cfg.vision.tile_layouts == ((1, 1), (1, 2))


# What cannot work

REFUSED = [  # changes of `tiny`, and what the sentence must say
    ({"fusion_kind": "unifid"}, "fusion.kind 'unifid' .* unified, cross_attention"),
    ({"data_augment": ("mirror", "shft")}, "data.augment 'shft' .* mirror, turn, shift"),
    ({"vision_image_size_px": 15}, "vision.image_size_px 15 .* vision.patch_size_px 8.*1, 3, 5, 15 px fit"),
    ({"decoder_heads": 5}, "decoder.width 32 .* decoder.heads 5"),
    ({"vision_heads": 5}, "vision.width 32 .* vision.heads 5"),
    ({"decoder_kv_heads": 3}, "decoder.heads 4 .* decoder.kv_heads 3"),
    ({"vision_kv_heads": 3}, "vision.heads 4 .* vision.kv_heads 3"),
    ({"projector_kind": "resampler", "projector_heads": 5}, "decoder.width 32 .* projector.heads"),
    ({"decoder_rope": Rope(fraction=0.4)}, "decoder.rope.fraction 0.4 .* even"),
    ({"decoder_rope": Rope(fraction=0.0)}, "decoder.rope.fraction 0.0"),
    ({"decoder_rope": Rope(fraction=1.5)}, "decoder.rope.fraction 1.5"),
    (
        {"projector_kind": "pixel_shuffle", "projector_factor": 3},
        "projector.factor 3 .* vision.image_size_px 16 .* vision.patch_size_px 8",
    ),
    (
        {"projector_kind": "average_pool", "vision_class_token": True, "vision_keep_class_token": True},
        "projector.kind average_pool .* vision.keep_class_token",
    ),
    (
        {"fusion_kind": "cross_attention", "vision_newline_token": True},
        "vision.newline_token True .* fusion.kind cross_attention",
    ),
    (
        {"fusion_kind": "encoder_decoder", "vision_kind": "none", "vision_positions": "none"},
        "vision.kind none .* vision.positions none .* fusion.kind encoder_decoder",
    ),
    (
        {"fusion_kind": "cross_attention", "fusion_cross_layers": (1, 3)},
        r"fusion.cross_layers \[3\] .* decoder.depth 2",
    ),
    (
        {"fusion_kind": "cross_attention", "fusion_cross_layers": (1,), "fusion_cross_every": 2},
        r"fusion.cross_every 2 and fusion.cross_layers \[1\] both",
    ),
    (
        {"fusion_cross_every": 2},
        "fusion.cross_every 2 is of fusion.kind cross_attention and hybrid: with .* unified",
    ),
    ({"fusion_cross_layers": (1,)}, r"fusion.cross_layers \(1,\) is of fusion.kind cross_attention and hybrid"),
    ({"fusion_kind": "encoder_decoder", "fusion_gated": False}, "fusion.gated False .* fusion.kind encoder_decoder"),
    ({"optim_rate_scale": RateScale(0, 0, 0, 0)}, "optim.rate_scale is 0 for vision, .*: nothing would learn"),
    ({"data_source": "conversations"}, "data.source conversations needs data.files"),
    ({"data_files": ("a.json",)}, "data.files is of data.source conversations, not of easy_vqa"),
    ({"data_image_dir": "a"}, "data.image_dir is of data.source conversations, not of easy_vqa"),
    ({"data_source": "tfds:vqa", "data_augment": ("mirror",)}, "data.augment mirror .* data.source tfds:vqa .* untrue"),
    ({"data_images_per_row": 2}, "data.images_per_row 2 is of conversations: with data.source easy_vqa .* one"),
    ({"data_source": "tfds:vqa", "fusion_blind_rows": "read_all"}, "fusion.blind_rows read_all .* other conversations"),
    (
        {"data_source": "tfds:vqa", "data_images_per_row": 3, "decoder_max_positions": 35},
        "decoder.max_positions 35 has no room for the 12 image tokens .* at least 36",
    ),
    (
        {"fusion_kind": "hybrid", "vision_tiles": 2, "vision_thumbnail": False},
        "vision.thumbnail False leaves fusion.kind hybrid .* vision.tiles to 1",
    ),
    (
        {"fusion_kind": "hybrid", "vision_kind": "none", "vision_positions": "none"},
        "vision.kind none .* vision.positions none .* fusion.kind hybrid",
    ),
    (
        {"fusion_kind": "hybrid", "vision_tiles": 2, "fusion_blind_rows": "read_all"},
        "fusion.blind_rows read_all .* vision.tiles 2",
    ),
    (
        {"fusion_kind": "hybrid", "fusion_prefix": "bidirectional"},
        "fusion.prefix bidirectional .* data.questions_per_row 3",
    ),
    (
        {"vision_tiles": 8},
        r"decoder.max_positions 64 has no room for the 45 image tokens of a row \(vision.tiles 8\) .* at least 69",
    ),
    ({"data_tag_ids": ((4,), (5,))}, "data.tag_ids names the tags of tiles, .* vision.tiles 1 and vision.tile_tags 1d"),
    ({"vision_tiles": 2, "data_tag_ids": ((4,), (5,))}, "data.tag_ids has 2 tags for the 3 views of vision.tiles 2"),
    ({"decoder_max_positions": 27}, "decoder.max_positions 27 .* data.text_length 24: it must be at least 28"),
]


@pytest.mark.parametrize("values, said", REFUSED, ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_what_cannot_work_together_is_refused_in_a_sentence_that_names_the_fields(values, said):
    with pytest.raises(ConfigError, match=said):
        validate(changed(tiny(), **values))


def with_value(part, field, value):
    """The dataclass with `value` at "section.field"."""
    name, _, rest = field.partition(".")
    return replace(part, **{name: with_value(getattr(part, name), rest, value) if rest else value})


@pytest.mark.parametrize("field", AT_LEAST)
def test_a_value_below_its_least_is_refused_by_name(field):
    least = AT_LEAST[field]
    with pytest.raises(ConfigError, match=f"^{field} is {least - 1}: it must be at least {least}"):
        validate(with_value(tiny(), field, least - 1))


FLOATS = [field for field, kind in kinds(tiny()).items() if kind is float]


@pytest.mark.parametrize(
    "field, value, said",
    [(field, 0.0, "above 0") for field in ABOVE]
    + [(field, most + 1, f"at most {most}") for field, most in AT_MOST.items()]
    + [(field, 1.0, "below 1") for field in BELOW]
    + [(field, float(word), "it must be") for field in FLOATS for word in ("nan", "inf")],
)
def test_a_number_outside_of_its_range_is_refused_by_name(field, value, said):
    with pytest.raises(ConfigError, match=f"^{field} is {value}: .*{said}"):
        validate(with_value(tiny(), field, value))


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("train.steps", "many", "it must be int"),
        ("train.steps", 1e3, "it must be int"),
        ("decoder.width", True, "it must be int"),
        ("optim.learning_rate", "0.1", "it must be float"),
        ("fusion.gated", 1, "it must be bool"),
        ("vision.image_mean", (0.5, 0.5), "it must be a tuple of 3 float"),
        ("vision.tile_layouts", ((1, 1, 1),), "it must be a tuple of a tuple of 2 int"),
        ("fusion", "unified", "it must be Fusion"),
        ("vision", Fusion(), "it must be Vision"),
        ("fusion.kind", None, "it must be str"),
        ("data.augment", "mirror", "it must be a tuple of str"),
        ("fusion.cross_layers", (0, "1"), "it must be a tuple of int"),
    ],
)
def test_a_value_of_another_type_in_a_config_is_refused_by_name(field, value, said):
    cfg = with_value(tiny(), field, value)
    for refuse in (validate, lambda cfg: config_file.override(cfg, [], "test")):
        with pytest.raises(ConfigError, match=f"^{field} is {re.escape(repr(value))}: {said}"):
            refuse(cfg)


def test_tuples_of_every_form_are_read():
    arguments = ["--data.special-ids", "3", "2", "1", "0", "--vision.tile-layouts", "1", "1", "2", "1"]
    arguments += ["--fusion.cross-layers", "--vision.checkpoint", ""]
    cfg = config_file.override(tiny(), arguments, "test")
    assert cfg.data.special_ids == (3, 2, 1, 0)
    assert cfg.vision.tile_layouts == ((1, 1), (2, 1))
    assert cfg.fusion.cross_layers == ()
    assert cfg.vision.checkpoint == ""


def test_a_whole_number_is_a_number():
    validate(with_value(tiny(), "optim.learning_rate", 1))


@pytest.mark.parametrize("kind", KINDS)
def test_another_fusion_is_one_word_on_the_command_line(kind):
    cfg = config_file.override(load("easy_vqa_cross_attention"), ["--fusion.kind", kind], "test")
    assert validate(cfg).fusion == Fusion(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiny_experiment_is_valid_and_comes_back_as_it_came(kind):
    cfg = tiny(kind)
    assert validate(cfg) is cfg


def test_room_for_exactly_the_row_is_enough():
    validate(changed(tiny(), decoder_max_positions=28))


def test_fields_of_an_encoder_that_is_not_there_are_not_judged():
    validate(changed(tiny(), vision_kind="none", vision_heads=5))


@pytest.mark.parametrize(
    "devices, mesh, sizes", [(8, Mesh(), (8, 1, 1)), (8, Mesh(2, -1, 2), (2, 2, 2)), (1, Mesh(), (1, 1, 1))]
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
