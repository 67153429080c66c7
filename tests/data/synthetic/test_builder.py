"""Drawn datasets: the same bytes everywhere, and answers that cannot be guessed."""

import hashlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from experiments import datasets
from vlm_jax.config import Data, UserError, files
from vlm_jax.config.validate import validate
from vlm_jax.data import (
    length_check,
    pipeline,
    questions,
    sources,
)
from vlm_jax.data.builders.records import Record
from vlm_jax.data.synthetic.blind_baselines import question_only_baselines
from vlm_jax.data.text import answer_ids, drop_overflow, prompt_ids
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.evaluate import warn_of_long_answers
from vlm_jax.testing import tiny

NAMES = ("glyphs", "digits")
CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.py"))
DRAWN = [path for path in CONFIGS if "seed" in files.load(str(path)).data.dataset.fields]
by_name = pytest.mark.parametrize("name", NAMES)


def drawn(name, directory, **fields) -> Data:
    return Data(
        **{"source": name, "dir": directory, "images": (1200, 20, 100), "augment": ()} | fields
    )


def digest(records) -> str:
    return hashlib.sha256(repr(list(records)).encode()).hexdigest()


def test_another_process_prepares_the_same_bytes_silently_without_tensorflow(
    datasets_dir, tmp_path
):
    there = [drawn(name, str(tmp_path), images=(5, 20, 3)) for name in NAMES]
    here = [drawn(name, datasets_dir) for name in NAMES]
    splits = ["validation", "validation", "test"]
    there.append(Data(dir=str(tmp_path)))
    here.append(Data(dir=datasets_dir))
    code = (
        "from vlm_jax.config import Data; from vlm_jax.data import sources; import hashlib, sys\n"
        f"for data, split in zip({there!r}, {splits!r}):\n"
        "    records = list(sources.load(data, split))\n"
        "    print(hashlib.sha256(repr(records).encode()).hexdigest())\n"
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)"
    )
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = []
    for data, split in zip(here, splits):
        lines.append(f"preparing the dataset {data.source} in {tmp_path}")
        lines.append(digest(sources.load(data, split)))
    assert done.stdout.splitlines() == lines


@by_name
def test_an_example_does_not_depend_on_how_many_are_drawn(name, datasets_dir, tmp_path):
    few, many = (drawn(name, str(tmp_path), images=(4, 1, 1)), drawn(name, datasets_dir))
    assert list(sources.load(few, "train")) == [sources.load(many, "train")[i] for i in range(4)]


@by_name
def test_another_seed_split_or_size_draws_other_images(name, datasets_dir, tmp_path):
    small = {"images": (3, 3, 3)}
    usual = drawn(name, str(tmp_path), **small)
    kinds = {
        "usual": sources.load(usual, "train"),
        "seed": sources.load(replace(usual, seed=1), "train"),
        "split": sources.load(usual, "validation"),
        "size": sources.load(replace(usual, image_px=448), "train"),
    }
    assert len({digest(records) for records in kinds.values()}) == 4
    sizes = {kind: Image.open(io.BytesIO(records[0].image)).size for kind, records in kinds.items()}
    assert sizes == {"usual": (64, 64), "seed": (64, 64), "split": (64, 64), "size": (448, 448)}


@by_name
def test_every_text_of_the_test_split_is_encodable_by_the_tokenizer_of_the_training_split(
    name, datasets_dir
):
    train, test = (sources.load(drawn(name, datasets_dir), split) for split in ("train", "test"))
    tokenizer = Tokenizer.train(
        (text for record in train for text in record.questions + record.answers), 320
    )
    for record in test:
        for question, answer in zip(record.questions, record.answers, strict=True):
            assert tokenizer.decode(prompt_ids(tokenizer, question)) == question + "\n"
            assert tokenizer.decode(answer_ids(tokenizer, answer)) == answer


def small(path, datasets_dir):
    """The experiment of a config, on few images."""
    cfg = files.load(str(path))
    return replace(cfg, data=replace(cfg.data, dir=datasets_dir, images=(400, 100, 100)))


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_the_rows_of_a_config_have_room_for_nearly_all_questions_and_its_answers_can_be_reached(
    path, datasets_dir
):
    cfg = small(path, datasets_dir)
    tokenizer = pipeline.train_tokenizer(cfg)
    rows = length_check.sampled_rows(cfg, tokenizer)
    assert len(rows) == 400
    assert sum(len(drop_overflow(cfg, row)) for row in rows) > 0.98 * sum(map(len, rows))
    for split in ("train", "validation", "test"):
        assert warn_of_long_answers(cfg, tokenizer, questions.load(cfg, split)) == ""


def test_the_blind_say_one_thing_or_repeat_a_word():
    asked = ("a or b?", "d or c?", "b or a?", "a or c?")
    records = [
        Record(0, b"", asked[:2], ("b", "c"), ("either", "either")),
        Record(1, b"", asked[2:], ("b", "c"), ("either", "other")),
    ]
    assert question_only_baselines(records) == {"either": (3, 2 / 3, 2 / 3), "other": (1, 1.0, 1.0)}


def test_the_script_draws_a_sheet_and_prints_the_baselines(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    datasets.main(datasets.Show("digits", sheet, images=10, dir=str(tmp_path)))
    assert Image.open(sheet).width > 100
    assert "| `count` | 10 |" in capsys.readouterr().out


# Share of questions that a guess without the image answers at most; chance may add 0.03.
GUESSED = {
    "glyphs": {"count": 1 / 4, "first": 1 / 2, "present": 1 / 2}
    | {f"read_{what}": 0.02 for what in ("all", "nth", "color", "corner", "largest", "smallest")},
    "digits": {
        "count": 1 / 4,
        "count_value": 1 / 4,
        "sum_all": 0.05,
        "sum_ends": 0.1,
        "locate_corner": 0.1,
    }
    | {
        "locate_beside": 1 / 9,
        "compare_sizes": 1 / 2,
        "compare_counts": 1 / 2,
        "compare_values": 1 / 2,
    },
}


@by_name
def test_questions_alone_are_answered_by_chance(name, datasets_dir):
    found = question_only_baselines(sources.load(drawn(name, datasets_dir), "train"))
    assert set(found) == set(GUESSED[name])
    for kind, (count, constant, repeated) in found.items():
        assert max(constant, repeated) < GUESSED[name][kind] + 1.2 * count**-0.5, (
            kind
        )  # 2.4 deviations or more


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_px": 63}, "data.image_px is 63: it must be at least 64"),
        ({"image_px": 449}, "data.image_px is 449: it must be at most 448"),
        ({"seed": -1}, "data.seed is -1"),
        ({"images": (10, 0, 10)}, "data.images is 10 0 10: .* at least 1 image"),
        (
            {"augment": ("mirror",)},
            "data.augment mirror .* invalidate .* data.source glyphs: leave it empty",
        ),
        (
            {"source": "easy_vqa", "image_px": 128},
            "data.image_px applies only to data.source glyphs and digits, not to easy_vqa",
        ),
        ({"cell_px": 5}, "data.cell_px is 5: it must be at least 6, or None"),
        ({"cell_px": 9}, "data.cell_px is 9: it must be at most 8"),
        (
            {"source": "easy_vqa", "transcript": True},
            "data.transcript applies only to data.source glyphs and digits, not to easy_vqa",
        ),
        (
            {"transcript": True},
            "data.transcript True does not contain the sizes of words, .* "
            "set data.cell_px to 6 to 8",
        ),
        (
            {"source": "easy_vqa", "seed": 3},
            "data.seed applies only to data.source glyphs and digits",
        ),
        (
            {"source": "easy_vqa", "seed": 3},
            "data.seed applies only to data.source glyphs and digits",
        ),
    ],
)
def test_a_mistake_names_its_field(fields, said):
    usual = {"source": "glyphs", "augment": (), "text_length": 24}
    validate(tiny(data=Data(**usual)))
    with pytest.raises(UserError, match=said):
        validate(tiny(data=Data(**usual | fields)))
