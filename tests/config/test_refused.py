"""Invalid experiments are refused by name, and borderline valid ones are not."""

import re
from dataclasses import replace

import pytest

from vlm_jax.config import (
    PROJECTORS,
    ConfigError,
    Experiment,
    Fusion,
    LrMult,
    PatchRope,
    Rope,
    files,
)
from vlm_jax.config.bounds import (
    ABOVE,
    AT_LEAST,
    AT_MOST,
    BELOW,
    PATHS,
)
from vlm_jax.config.model.projector import ProjectorSpec
from vlm_jax.config.validate import (
    element_type,
    flat,
    is_optional,
    kinds,
    required_type,
    validate,
)
from vlm_jax.testing import KINDS, tiny


def changed(cfg: Experiment, **values) -> Experiment:
    """`section_field=value`, the section up to the first underscore."""
    for name, value in values.items():
        section, field = name.split("_", 1)
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{field: value})})
    return cfg


MAPPED = {"vision_tiles": 2, "vision_tile_grids": ((1, 1), (1, 2))}
TILED = {"vision_tiles": 2, "vision_tile_layouts": ((1, 1), (1, 2)), "vision_num_global_layers": 1}
TILED |= {"vision_class_token": True, "vision_keep_class_token": True}
# Changes of `tiny`, and the message.
REFUSED = [
    (
        {"train_double_quantization": False},
        "train.double_quantization False has no effect without train.frozen_dtype nf4",
    ),
    (
        {"vision_patch_square": 2},
        "patch_square 2 .* set vision.max_patches, or leave it out",
    ),
    ({"vision_windowed_layers": (0,)}, "vision.windowed_layers .* native resolution alone"),
    (
        {"vision_max_patches": 8, "vision_window_patches": 2},
        "windowed_layers .* one another",
    ),
    (
        {"vision_max_patches": 8, "vision_class_token": True},
        "class_token True is not possible",
    ),
    ({"vision_max_patches": 8, "projector_kind": "pixel_shuffle"}, "patch_square 1 .* set it to 2"),
    ({"vision_max_patches": 8, "fusion_prefix": "bidirectional"}, "fusion.prefix .* of one size"),
    (
        {"data_source": "tfds:vqa", "data_patches_per_row": 8},
        "data.patches_per_row 8 applies to images at native resolution alone",
    ),
    (
        {"data_source": "tfds:vqa", "vision_max_patches": 8, "data_patches_per_row": 7},
        "data.patches_per_row 7 has no room for an image of vision.max_patches 8",
    ),
    ({"vision_deepstack_layers": (1,)}, r"deepstack_layers \(1,\) needs vision.max_patches"),
    (
        {
            "vision_max_patches": 8,
            "vision_patch_square": 2,
            "vision_deepstack_layers": (1, 2),
            "projector_kind": "pixel_shuffle",
            "fusion_kind": "cross_attention",
        },
        "deepstack_layers .* and one more .* cross_attention has 2",
    ),
    ({"vision_deepstack_layers": (3,)}, "deepstack_layers 3 is not a block of .* choose 1 to 2"),
    ({"decoder_rope": Rope(sections=(1, 1))}, "rope.sections .* with the sum 4, half of"),
    (
        {"decoder_rope": Rope(interleaved=True)},
        "rope.interleaved True .* without .*sections",
    ),
    (
        {"decoder_rope": Rope(sections=(2, 1, 1), scaling="linear", factor=2.0)},
        r"rope.sections has no effect with .*scaling",
    ),
    ({"decoder_sliding_layers": (0,)}, "decoder.sliding_layers needs decoder.sliding_window"),
    ({"decoder_sliding_window": 4}, "decoder.sliding_window 4 .* list layers, or leave it out"),
    (
        {"decoder_sliding_window": 4, "decoder_sliding_layers": (0, 9)},
        "decoder.sliding_layers names layer 9: choose from 0 to 1",
    ),
    (
        {"decoder_no_rope_layers": (2,)},
        "decoder.no_rope_layers names layer 2: choose from 0 to 1",
    ),
    (
        {"decoder_no_rope_layers": (0,), "decoder_positions": "learned"},
        "decoder.no_rope_layers has no effect with decoder.positions learned",
    ),
    ({"fusion_kind": "unifid"}, "fusion.kind 'unifid' .* unified, cross_attention"),
    ({"data_augment": ("mirror", "shft")}, "data.augment 'shft' .* mirror, turn, shift"),
    (
        {"vision_image_size_px": 15},
        "vision.image_size_px 15 .* vision.patch_size_px 8.*1, 3, 5, 15 px fit",
    ),
    ({"decoder_heads": 5}, "decoder.width 32 .* decoder.heads 5"),
    ({"vision_heads": 5}, "vision.width 32 .* vision.heads 5"),
    ({"decoder_kv_heads": 3}, "decoder.heads 4 .* decoder.kv_heads 3"),
    (
        {"vision_rope": PatchRope("same"), "vision_heads": 16},
        "vision.rope.kind same needs a multiple of 4 .* not 2",
    ),
    (
        {"vision_rope": PatchRope("same"), "vision_kind": "none"},
        "vision.rope.kind same has no effect with vision.kind none",
    ),
    (TILED | {"vision_registers": 4}, "vision.tile_layouts .* vision.registers 4: set that to 0"),
    ({"vision_rope": PatchRope(theta=100.0)}, "vision.rope.theta 100.0 has no effect"),
    ({"vision_kv_heads": 3}, "vision.heads 4 .* vision.kv_heads 3"),
    ({"projector_kind": "resampler", "projector_heads": 5}, "decoder.width 32 .* projector.heads"),
    (
        {"projector_kind": "resampler", "projector_projection": "none", "vision_width": 16},
        "projector.projection none .* width 16, but with fusion.kind unified .* decoder.width 32",
    ),
    (
        {"projector_kind": "pixel_shuffle", "projector_projection": "none"},
        "projector.projection none is for projector.kind resampler, not for pixel_shuffle",
    ),
    (
        {"fusion_kind": "cross_attention", "fusion_gate": "vector"},
        "fusion.gate vector has no effect without gates: set fusion.gated to True",
    ),
    ({"decoder_rope": Rope(fraction=0.4)}, "decoder.rope.fraction 0.4 .* even"),
    ({"decoder_rope": Rope(fraction=0.0)}, "decoder.rope.fraction 0.0"),
    ({"decoder_rope": Rope(fraction=1.5)}, "decoder.rope.fraction 1.5"),
    (
        {"projector_kind": "pixel_shuffle", "projector_factor": 3},
        "projector.factor 3 .* vision.image_size_px 16 .* vision.patch_size_px 8",
    ),
    (
        {
            "projector_kind": "average_pool",
            "vision_class_token": True,
            "vision_keep_class_token": True,
        },
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
        "fusion.cross_every 2 has no effect with fusion.kind unified: .* "
        "choose fusion.kind cross_attention or hybrid",
    ),
    (
        {"fusion_cross_layers": (1,)},
        r"fusion.cross_layers \(1,\) has no effect with fusion.kind unified",
    ),
    (
        {"fusion_kind": "encoder_decoder", "fusion_gated": True},
        "fusion.gated True .* fusion.kind encoder_decoder",
    ),
    (
        {"fusion_qk_norm": False},
        "fusion.qk_norm False has no effect .* cross_attention, encoder_decoder or hybrid",
    ),
    (
        {"optim_lr_mult": LrMult(0, 0, 0, 0)},
        "optim.lr_mult is 0 for vision, projector, decoder, all .*: nothing would be trained",
    ),
    (
        {"optim_lr_mult": LrMult(0, 0, 0, 0), "fusion_kind": "cross_attention"},
        "optim.lr_mult is 0 for vision, projector, decoder, cross_attention, all .* trained",
    ),
    ({"optim_lr_mult": LrMult(0, 0, 0, 1)}, "optim.lr_mult is 0 for vision, projector, decoder,"),
    (
        {"optim_lr_mult": LrMult(1, 1, 0, 1), "fusion_kind": "text_only"},
        "optim.lr_mult is 0 for decoder, all parts of the model",
    ),
    (
        {
            "optim_lr_mult": LrMult(1, 0, 0, 1),
            "vision_kind": "none",
            "vision_positions": "sincos",
        },
        "optim.lr_mult is 0 for projector, decoder, all parts of the model",
    ),
    ({"data_source": "conversations"}, "data.source conversations needs data.files"),
    (
        {"data_source": "conversations", "data_files": ("a.json", "b.json", "a.json")},
        "data.files has a.json twice",
    ),
    (
        {"data_files": ("a.json",)},
        "data.files applies only to data.source conversations, not to easy_vqa",
    ),
    (
        {"eval_files": ("a.json",)},
        "eval.files applies only to data.source conversations, not to easy_vqa: leave it out",
    ),
    (
        {"data_image_dir": "a"},
        "data.image_dir applies only to data.source conversations, not to easy_vqa",
    ),
    (
        {"data_source": "tfds:vqa", "data_augment": ("mirror",)},
        "data.augment mirror .* invalidate .* data.source tfds:vqa",
    ),
    (
        {"data_images_per_row": 2},
        "data.images_per_row applies only to data.source conversations and tfds:NAME",
    ),
    (
        {"data_source": "tfds:vqa", "fusion_tokens_without_image": "attend_all"},
        "fusion.tokens_without_image attend_all .* conversations of a row",
    ),
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
        {"fusion_kind": "hybrid", "vision_tiles": 2, "fusion_tokens_without_image": "attend_all"},
        "fusion.tokens_without_image attend_all .* vision.tiles 2",
    ),
    (
        {"fusion_kind": "hybrid", "fusion_prefix": "bidirectional"},
        "fusion.prefix bidirectional .* data.questions_per_row 3",
    ),
    (
        {"fusion_kind": "cross_attention", "fusion_prefix": "bidirectional_images"},
        "fusion.prefix bidirectional_images .* fusion.kind cross_attention .* unified or hybrid",
    ),
    (
        {"vision_tiles": 8},
        r"decoder.max_positions 64 has no room for the 45 image tokens of a row "
        r"\(vision.tiles 8\) .* at least 69",
    ),
    (
        {"vision_feature_layers": (-1, 3)},
        "vision.feature_layers 3 is not a hidden state .* vision.depth 2: choose -3 to 2",
    ),
    (
        {"data_tag_ids": ((4,), (5,))},
        "data.tag_ids needs tile tags, which vision.tiles 1 and vision.tile_tags 1d",
    ),
    (
        {"vision_tiles": 2, "data_tag_ids": ((4,), (5,))},
        "data.tag_ids has 2 tags for the 3 views of vision.tiles 2",
    ),
    (
        {"data_special_ids": (0, 1, 2, 300)},
        "data.special_ids 300 is not a token: choose ids of 0 to 299 .decoder.vocab_size 300.",
    ),
    (
        {"data_special_ids": (-1, 1, 2, 3)},
        "data.special_ids -1 is not a token: choose ids of 0 to 299",
    ),
    ({"data_bos_id": 300}, "data.bos_id 300 is not a token: choose ids of 0 to 299"),
    (
        {"vision_tiles": 2, "data_tag_ids": ((4,), (5, 300), (6,))},
        "data.tag_ids 300 is not a token: choose ids of 0 to 299",
    ),
    (
        {"vision_tiles": 2, "data_tag_ids": ((4,), (-5,), (6,))},
        "data.tag_ids -5 is not a token: choose ids of 0 to 299",
    ),
    (
        {"vision_tiles": 2, "data_tag_ids": ((4,), (5, 1), (6,))},
        "data.tag_ids 1 is also in data.special_ids",
    ),
    (
        {"decoder_extra_tokens": 8, "data_special_ids": (0, 308, 2, 3)},
        "data.special_ids 308 .* 0 to 307 .decoder.vocab_size 300 and decoder.extra_tokens 8",
    ),
    (
        {"decoder_added_tokens": 2, "data_special_ids": (0, 301, 2, 302)},
        r"data.special_ids 302 is not a token: .* 0 to 301 .* decoder.added_tokens 2",
    ),
    (
        {"decoder_added_tokens": 2, "decoder_extra_tokens": 8},
        "decoder.extra_tokens 8 and decoder.added_tokens 2 both",
    ),
    (
        {"decoder_extra_tokens": 8, "data_special_ids": (0, 1, 2, 300)},
        r"data.special_ids ends in 300, the end of text, .* 0 to 299 \(decoder.vocab_size 300\)",
    ),
    (
        MAPPED | {"fusion_kind": "hybrid", "vision_thumbnail": False},
        "vision.thumbnail False leaves fusion.kind hybrid without image tokens",
    ),
    (
        MAPPED | {"vision_newline_token": True},
        "vision.tile_grids does not work with vision.newline_token True",
    ),
    (
        MAPPED | {"vision_tile_grids": ((1, 3),)},
        "vision.tile_grids 1 3 is not a valid grid: .* 1 to vision.tiles 2",
    ),
    (
        MAPPED | {"projector_kind": "resampler"},
        "vision.tile_grids needs a grid .* projector.kind to linear, mlp",
    ),
    (MAPPED | {"data_augment": ("turn",)}, "data.augment turn .* vision.tile_grids"),
    (MAPPED | {"vision_resize": "crop"}, "vision.resize crop .* vision.tiles 2"),
    ({"vision_max_map_tiles": 2}, "vision.max_map_tiles 2 has no effect without vision.tile_grids"),
    (TILED | {"vision_kind": "none"}, "vision.tile_layouts .* vision.kind none: set that to vit"),
    (
        TILED | {"vision_class_token": False, "vision_keep_class_token": False},
        "vision.tile_layouts .* vision.class_token False: set that to True",
    ),
    (
        TILED | {"vision_keep_class_token": False},
        "vision.tile_layouts .* vision.keep_class_token False: set that to True",
    ),
    (
        TILED | {"vision_num_global_layers": 0},
        "vision.tile_layouts needs vision.num_global_layers of at least 1, not 0",
    ),
    (TILED | {"vision_tile_layouts": ((1, 2),)}, "vision.tile_layouts must contain 1 1"),
    (
        TILED | {"vision_tiles": 1},
        "vision.tile_layouts 1 2 is not a valid layout: .* 1 to vision.tiles 1",
    ),
    (
        TILED | {"vision_tile_layouts": ((1, 1), (-1, -1))},
        "vision.tile_layouts -1 -1 is not a valid layout: .* 1 to",
    ),
    (
        TILED | {"projector_kind": "resampler"},
        "projector.kind resampler .* vision.tile_layouts: choose linear, mlp or none",
    ),
    (
        TILED | {"projector_kind": "pixel_shuffle"},
        "projector.kind pixel_shuffle .* choose linear, mlp or none",
    ),
    (
        {"decoder_max_positions": 27},
        "decoder.max_positions 27 .* data.text_length 24: it must be at least 28",
    ),
]


@pytest.mark.parametrize(
    "values, message", REFUSED, ids=lambda value: " ".join(value) if isinstance(value, dict) else ""
)
def test_what_cannot_work_together_is_refused_in_a_sentence_that_names_the_fields(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(changed(tiny(), **values))


def with_value(part, field, value):
    """The dataclass with `value` at "section.field"."""
    name, _, rest = field.partition(".")
    return replace(part, **{name: with_value(getattr(part, name), rest, value) if rest else value})


OPTIONAL = [field for field, kind in kinds(tiny()).items() if is_optional(kind)]


@pytest.mark.parametrize("field", [field for field in AT_LEAST if field in kinds(tiny())])
def test_a_value_below_its_least_is_refused_by_name(field):
    least = AT_LEAST[field]
    end = ", or None.$" if field in OPTIONAL else ".$"
    message = f"^{field} is {least - 1}: it must be at least {least}{end}"
    with pytest.raises(ConfigError, match=message):
        validate(with_value(tiny(), field, least - 1))


FLOATS = [
    field for field, kind in kinds(tiny()).items() if element_type(required_type(kind)) is float
]


@pytest.mark.parametrize(
    "field, value, message",
    [(field, 0.0, "above 0, or None" if field in OPTIONAL else "above 0") for field in ABOVE]
    + [
        (field, most + 1, f"at most {most}")
        for field, most in AT_MOST.items()
        if field in kinds(tiny())
    ]
    + [(field, 1.0, "below 1") for field in BELOW]
    + [(field, float(word), "it must be") for field in FLOATS for word in ("nan", "inf")],
)
def test_a_number_outside_of_its_range_is_refused_by_name(field, value, message):
    has_several = isinstance(flat(tiny())[field], tuple)
    with pytest.raises(ConfigError, match=f"^{field} is {value}: .*{message}"):
        validate(with_value(tiny(), field, (0.5, value, 0.5) if has_several else value))


@pytest.mark.parametrize("address", ["gs://bucket/a", "gs:/bucket/a"])
@pytest.mark.parametrize("field", PATHS)
def test_an_address_in_the_place_of_a_path_is_refused_by_name(field, address):
    value = (address,) if field.endswith(".files") else address
    with pytest.raises(ConfigError, match=f"^{field} {address} is a URL"):
        validate(with_value(tiny(), field, value))


@pytest.mark.parametrize(
    "field, value, message",
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
        ("fusion.kind", None, "it must be unified, cross_attention"),
        ("decoder.qk_norm", True, "it must be none, head or all_heads"),
        ("data.augment", "mirror", "it must be a tuple of mirror, turn or shift"),
        ("fusion.cross_layers", (0, "1"), "it must be a tuple of int"),
    ],
)
def test_a_value_of_another_type_in_a_config_is_refused_by_name(field, value, message):
    cfg = with_value(tiny(), field, value)
    for refuse in (validate, lambda cfg: files.override(cfg, [], "test")):
        with pytest.raises(ConfigError, match=f"^{field} is {re.escape(repr(value))}: {message}"):
            refuse(cfg)


def test_a_whole_number_is_a_number():
    validate(with_value(tiny(), "optim.learning_rate", 1))


def test_an_encoder_that_reads_tiles_together_is_not_refused():
    for kind in KINDS:
        validate(changed(tiny(kind), **TILED))


def test_tokens_that_are_read_alone_may_lie_behind_the_vocabulary():
    """As the image token of Llama 3.2 Vision does."""
    validate(changed(tiny(), decoder_extra_tokens=8, data_special_ids=(0, 307, 2, 299)))


def test_a_projector_that_cannot_take_packed_patches_is_refused(monkeypatch):
    """Such as the one of docs/extending.md."""
    cfg = changed(tiny(), vision_max_patches=8, vision_patch_square=2, projector_kind="mine")
    for tokens in ("squares", "queries"):
        monkeypatch.setitem(PROJECTORS, "mine", ProjectorSpec("Mine", tokens, fields=("factor",)))
        message = "kind mine does not take images at native resolution: .* choose linear, mlp, pix"
        with pytest.raises(ConfigError, match=message):
            validate(cfg)
    able = ProjectorSpec("Mine", "squares", fields=("factor",), native=True)
    monkeypatch.setitem(PROJECTORS, "mine", able)
    validate(cfg)


def test_room_for_exactly_the_row_is_enough():
    validate(changed(tiny(), decoder_max_positions=28))


def test_fields_of_an_encoder_that_is_not_there_are_not_judged():
    validate(changed(tiny(), vision_kind="none", vision_heads=5))


@pytest.mark.parametrize("kind", ["cross_attention", "encoder_decoder", "hybrid"])
def test_one_trained_part_is_enough(kind):
    validate(changed(tiny(kind), optim_lr_mult=LrMult(0, 0, 0, 1)))


def test_position_embeddings_without_an_encoder_can_be_trained():
    validate(changed(tiny(), vision_kind="none", optim_lr_mult=LrMult(1, 0, 0, 0)))
