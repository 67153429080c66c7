"""Any TFDS set of questions and answers is read as conversations of one question."""

from dataclasses import replace

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlm_jax.config import ConfigError, Data, Train, UserError
from vlm_jax.data import pipeline, questions, tfds_vqa
from vlm_jax.testing import tiny


class SmallVqa(tfds.core.GeneratorBasedBuilder):
    """Six gray squares; registered with TFDS by being defined."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    folder = None

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "photo": tfds.features.Image(),
                "question": tfds.features.Text(),
                "answer": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["dark", "bright"]),
                "answers": tfds.features.Sequence(tfds.features.Text()),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            path = f"{self.folder}/{i}.png"
            Image.new("RGB", (16, 16), (40 * i,) * 3).save(path)
            asked = {
                "question": f"is {i} bright?",
                "answer": "yes" if i > 2 else "no",
                "label": int(i > 2),
                "answers": ["dim", "dark", "dark"][: 3 - i % 3],
            }
            yield i, {"photo": path, **asked}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(SmallVqa, "folder", str(tmp_path))
    return Data(
        source="tfds:small_vqa",
        image_field="photo",
        dir=str(tmp_path),
        augment=(),
        images_per_row=2,
    )


def test_rows_are_conversations_of_one_question(data):
    source = pipeline.conversation_source(data, "train")
    assert [talk.images for talk in source] == [(i,) for i in range(6)]
    assert source[4].turns == ("<image>\nis 4 bright?", "yes")
    assert source.image(3)[0] == "the image of row 3 of data.source tfds:small_vqa, split 'train'"
    cfg = tiny(data=replace(data, text_length=60), train=Train(batch_size=2))
    batch = next(pipeline.training_iterator(cfg, pipeline.train_tokenizer(cfg)))
    assert batch.images.shape == (2, 2, 16, 16, 3)
    assert batch.segment_ids.max() == 2


def test_the_most_frequent_of_several_answers_is_trained_on_and_all_are_right(data):
    several = replace(data, answer_field="answers")
    source = pipeline.conversation_source(several, "train")
    assert [talk.turns[1] for talk in source] == ["dark", "dim", "dim"] * 2
    cfg = tiny(data=several)
    asked = questions.load(cfg, "train", 2)
    assert [one.references for one in asked] == [("dim", "dark", "dark"), ("dim", "dark")]


def test_a_text_has_no_place_for_an_image():
    """A placeholder in an answer raised StopIteration."""
    data = Data(source="tfds:x", image_field="photo", question_field="q", answer_field="a")
    row = {"q": b"which <image>?", "a": b"an <image> tag"}
    (talk,) = tfds_vqa.TfdsVqa([row], data, None)
    assert talk.turns == ("<image>\nwhich ?", "an  tag")


class PartlyLabeled(tfds.core.GeneratorBasedBuilder):
    """Six rows of text; the last `unlabeled` of a split have no label, in TFDS -1."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        label = tfds.features.ClassLabel(names=["dark", "bright"])
        features = tfds.features.FeaturesDict({"asked": tfds.features.Text(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        unlabeled = {"train": 0, "some": 2, "test": 6}
        return {split: self._generate_examples(count) for split, count in unlabeled.items()}

    def _generate_examples(self, unlabeled):
        for i in range(6):
            yield i, {"asked": f"is {i} bright?", "label": i % 2 if i < 6 - unlabeled else -1}


@pytest.fixture
def labeled(tmp_path):
    fields = {"image_field": "", "question_field": "asked", "answer_field": "label"}
    return Data(source="tfds:partly_labeled", **fields, dir=str(tmp_path), augment=())


def test_rows_without_a_label_are_left_out_and_counted(labeled, capsys):
    source = pipeline.conversation_source(labeled, "some")
    assert [talk.turns[1] for talk in source] == ["dark", "bright"] * 2
    assert [talk.id for talk in source] == ["0", "1", "2", "3"]
    assert (
        "2 of the 6 rows of data.source tfds:partly_labeled, split 'some' have no label in "
        "'label' and are left out" in capsys.readouterr().out
    )
    pipeline.conversation_source(labeled, "some")
    assert len(pipeline.conversation_source(labeled, "train")) == 6
    assert capsys.readouterr().out == "", "printed once, and only where rows are left out"


@pytest.mark.parametrize(
    "split, field",
    [("test", "eval.split"), ("some[4:]", "eval.split"), ("test", "data.train_split")],
)
def test_a_split_without_any_label_is_refused(split, field, labeled):
    if field == "data.train_split":
        labeled = replace(labeled, train_split=split)
    with pytest.raises(
        ConfigError,
        match=f"{field} .*: all of the . rows of data.source tfds:partly_labeled, .* no label",
    ):
        pipeline.conversation_source(labeled, split)


def test_a_text_that_is_not_utf_8_is_named_with_its_row(labeled, monkeypatch):
    source = pipeline.conversation_source(labeled, "train")
    monkeypatch.setattr(
        source._rows, "_rows", [{"asked": b"a", "label": 0}, {"asked": b"\xff", "label": 0}]
    )
    with pytest.raises(
        ConfigError,
        match="row 1 of data.source tfds:partly_labeled, split 'train': "
        "the feature 'asked' .data.question_field. is",
    ):
        list(source)


def test_a_class_answers_where_nothing_is_asked_and_text_may_stand_alone(data):
    classes = replace(data, question_field="", answer_field="label")
    assert pipeline.conversation_source(classes, "train")[0].turns == ("<image>", "dark")
    text = replace(data, image_field="")
    source = pipeline.conversation_source(text, "train[:2]")
    assert (source[1].turns, source[1].images, source.most_images) == (
        ("is 1 bright?", "no"),
        (),
        0,
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"image_field": "image"},
            "data.image_field 'image' is not a feature of small_vqa: choose photo",
        ),
        ({"question_field": "label"}, "data.question_field 'label' .*: choose question, answer"),
        ({"answer_field": ""}, "data.answer_field '' .*: choose question, answer, label"),
        ({"source": "tfds:smal_vqa"}, "data.source tfds:smal_vqa is not a dataset of TFDS"),
    ],
)
def test_what_the_dataset_lacks_is_said_with_the_choices(data, change, said):
    with pytest.raises(UserError, match=said):
        pipeline.conversation_source(replace(data, **change), "train")
