"""Attention on objects: its numbers, and where the datasets say that objects are."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import Data, UserError
from vlm_jax.data import questions, sources
from vlm_jax.data.builders.boxes import coverage
from vlm_jax.infer.evaluate import attend
from vlm_jax.infer.look.grounding import _measure
from vlm_jax.infer.look.maps import AttentionMaps
from vlm_jax.infer.metrics.grounding import Attention
from vlm_jax.infer.metrics.scores import (
    Reference,
    check_attention,
    describe_numbers,
    evaluate_model,
)
from vlm_jax.testing import tiny

QUARTER = (0.0, 0.0, 0.5, 0.5)  # the upper left quarter of an image


def grounding(maps, box=QUARTER):
    attention = Attention(("self 0",), np.asarray(maps, float)[None], box)
    return evaluate_model(["grounding"], [attention])["grounding"][0]


def test_uniform_attention_has_the_area_of_the_object():
    value = grounding(np.full((4, 4), 0.05))
    assert value.mass[0] == value.pointing[0] == value.area == pytest.approx(0.25)
    assert value.image[0] == pytest.approx(0.8)


def test_attention_on_the_object_alone_has_mass_and_pointing_1():
    value = grounding([[0.2, 0.1, 0, 0], [0.1, 0.1, 0, 0], [0] * 4, [0] * 4])
    assert value.mass[0] == value.pointing[0] == 1
    elsewhere = grounding([[0] * 4, [0] * 4, [0] * 4, [0, 0, 0, 1]])
    assert elsewhere.mass[0] == elsewhere.pointing[0] == 0


def test_a_patch_counts_by_the_share_that_the_object_covers():
    covered = coverage((0.125, 0.0, 0.5, 0.25), (2, 4))
    np.testing.assert_allclose(covered, [[0.25, 0.5, 0, 0], [0, 0, 0, 0]])
    assert grounding([[1, 0, 0, 0], [0] * 4], (0.125, 0.0, 0.5, 0.25)).mass[0] == 0.25


def test_questions_without_an_object_have_no_value():
    values = [grounding(np.eye(4)), None, grounding(np.ones((4, 4))), None]
    right = [Reference(["a"], "x", kind) for kind in ("corner", "count", "corner", "count")]
    numbers = describe_numbers("grounding", values, right)
    assert numbers["grounding"] == pytest.approx((0.5 + 0.25) / 2)
    assert numbers["grounding_examples"] == 2
    assert numbers["grounding_by_type"].keys() == {"corner"}
    assert numbers["grounding_by_layer"]["self 0"]["mass"] == numbers["grounding"]


def test_the_map_of_an_image_at_native_resolution_has_its_shape():
    """It is in the upper left of the maps of a row, and all of it is the image."""
    cfg = tiny(vision=replace(tiny().vision, max_patches=64))
    weights = np.zeros((1, 1, 1, 2, 8, 9))
    weights[0, 0, 0, 0, :4, :6] = np.arange(24).reshape(4, 6)
    maps = AttentionMaps(np.array([7], np.int32), ("self 0",), weights)
    pixels = np.zeros((32, 48, 3), np.uint8)
    question = questions.Question(0, "where?", "there", "", lambda: [pixels])
    attention = _measure(maps, question, cfg, QUARTER, eos_id=3)
    np.testing.assert_array_equal(attention.maps[0], weights[0, 0, 0, 0, :4, :6])


@pytest.mark.parametrize(("source", "types"), [
    ("digits", {"locate_corner", "locate_beside", "compare_sizes"}),
    ("glyphs", {"read_nth", "read_color", "read_corner", "read_largest", "read_smallest", "first",
                "present"}),
])  # fmt: skip
def test_boxes_of_synthetic_datasets_hold_the_object_of_the_question(source, types, datasets_dir):
    data = Data(source=source, dir=datasets_dir, images=(2, 2, 30), image_px=128, augment=())
    builder, asked = sources.builder(data), set()
    for record in sources.load(data, "test[5:]"):
        pixels = np.asarray(Image.open(io.BytesIO(record.image)))
        boxes = builder.boxes(record, "test[5:]")
        for question_type, box, answer in zip(record.types, boxes, record.answers, strict=True):
            if box is None:
                continue
            asked.add(question_type)
            assert answer != "no"
            left, top, right, bottom = np.round(np.multiply(box, 128)).astype(int)
            assert (pixels[top:bottom, left:right] != pixels[0, 0]).any()
    assert asked == types


def test_the_digit_in_a_corner_is_in_the_corner(datasets_dir):
    data = Data(source="digits", dir=datasets_dir, images=(2, 2, 30), image_px=128, augment=())
    builder = sources.builder(data)
    for record in sources.load(data, "test"):
        for question, box in zip(record.questions, builder.boxes(record, "test")):
            if "corner" in question:
                left, top, right, bottom = box
                assert (right <= 0.5) == ("left" in question)
                assert (bottom <= 0.5) == ("top" in question)
                assert right > left and bottom > top


def test_the_box_of_easy_vqa_holds_the_shape_and_nothing_else(datasets_dir):
    data = Data(dir=datasets_dir)
    builder = sources.builder(data)
    for record in [sources.load(data, "test")[i] for i in range(10)]:
        boxes = builder.boxes(record, "test")
        assert len(boxes) == len(record.questions) and len(set(boxes)) == 1
        left, top, right, bottom = np.multiply(boxes[0], 64).astype(int)
        pixels = np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB")).astype(int)
        # Backgrounds are light, shapes are not.
        is_shape = pixels.min(-1) < 200
        inside = is_shape[top:bottom, left:right]
        assert inside.sum() == is_shape.sum() > 0
        # The edges of a shape are smoothed.
        for side in (inside, inside.T):
            assert side[:3].any() and side[-3:].any()


@pytest.mark.parametrize(("cfg", "message"), [
    (tiny("text_only"), "fusion.kind text_only has none"),
    (tiny(data=Data(source="conversations", files=("a.json",))), "choose easy_vqa, glyphs, digits"),
    (tiny(vision=replace(tiny().vision, resize="crop", resize_px=20)), "choose squash"),
])  # fmt: skip
def test_models_and_datasets_without_objects_are_refused(cfg, message):
    cfg = replace(cfg, eval=replace(cfg.eval, metrics=("grounding",)))
    with pytest.raises(UserError, match=message):
        check_attention(cfg)


def test_questions_of_which_none_has_an_object_are_refused(monkeypatch):
    monkeypatch.setattr(questions, "boxes_to_evaluate", lambda cfg: [None, None])
    cfg = tiny()
    cfg = replace(cfg, eval=replace(cfg.eval, metrics=("grounding",)))
    with pytest.raises(UserError, match="eval.metrics grounding has no question to score"):
        attend(cfg, None, None, [], [])
