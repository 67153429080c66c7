"""A run on conversations from the command line: cuts, evaluation, other data of the same name."""

import json
import shutil
from pathlib import Path

import pytest

from vlm_jax.cli.main import main
from vlm_jax.testing import write_conversations

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = """
from dataclasses import replace
from pathlib import Path

from vlm_jax.config import Eval, Train
from vlm_jax.testing import tiny, write_conversations


def get_config():
    cfg = tiny()
    data = replace(
        cfg.data,
        source="conversations",
        files=({folder!r} + "/talks.json",),
        image_dir={folder!r},
        dir={folder!r} + "/datasets",
        images_per_row=3,
        text_length=40,
    )
    return replace(
        cfg,
        data=data,
        decoder=replace(cfg.decoder, max_positions=128),
        train=Train(steps=2, batch_size=8, checkpoint_every_steps=1, log_every_steps=1),
        eval=Eval(split="train[:2]", batch_size=8, max_new_tokens=3),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    write_conversations(folder, count=6)
    talks = json.loads((folder / "talks.json").read_text())
    talks.append(
        talks[0]
        | {"id": "long", "conversations": [{**talks[0]["conversations"][0], "value": "a " * 300}]}
    )
    talks[-1]["conversations"] += talks[0]["conversations"][1:2]
    (folder / "talks.json").write_text(json.dumps(talks))
    held_out = [talks[1] | {"type": "colors"}, talks[2], talks[3]]
    (folder / "mine.json").write_text("\n".join(map(json.dumps, held_out)))
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """The work folder of a run; tests leave it as it is."""
    assert main(["--config", str(folder / "config.py"), "--workdir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_what_is_cut_is_printed_before_the_training(folder, tmp_path, capsys):
    assert (
        main(
            [
                "--config",
                str(folder / "config.py"),
                "--workdir",
                str(tmp_path / "run"),
                "--eval.split",
                "",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    message = out[: out.index("step 1/2")]
    assert "of 7 conversations are longer than a row (data.text_length 40) and are cut" in message
    assert (
        f"1 have no scored token left and are left out: {folder}/talks.json: record 6 (id 'long')."
        in message
    )


def test_eval_takes_the_checkpoint_of_a_step(run, capsys):
    (run / "best.json").write_text('{"step": 1}')
    steps = []
    for name in ("best", "last"):
        assert main(["eval", "--workdir", str(run), "--step", name]) == 0
        scores = max((run / "eval").glob("*/eval.json"), key=lambda file: file.stat().st_mtime_ns)
        steps.append(json.loads(scores.read_text())["step"])
    assert steps == [1, 2]
    assert main(["eval", "--workdir", str(run), "--step", "7"]) == 2
    assert "no checkpoint of step 7: choose 2, 1" in capsys.readouterr().err


def test_eval_of_other_files_has_a_folder_of_its_own_and_the_types_of_its_records(
    run, folder, capsys
):
    before = (run / "eval.json").read_bytes()
    mine = str(folder / "mine.json")
    command = ["eval", "--workdir", str(run), "--eval.files", mine, "--eval.split", "train"]
    assert main(command) == 0
    assert f"on 3 questions of train of {mine}" in capsys.readouterr().out
    scores = json.loads((run / "eval" / "mine" / "eval.json").read_text())
    assert (scores["files"], scores["split"], scores["examples"], scores["step"]) == (
        [mine],
        "train",
        3,
        2,
    )
    assert set(scores["by_type"]) == {"colors", "conversation"}
    predictions = (run / "eval" / "mine" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["type"] for line in predictions] == [
        "colors",
        "conversation",
        "conversation",
    ]
    assert main([*command[:-1], "test"]) == 0, (
        "with the default of eval.split all of the files are asked"
    )
    assert json.loads((run / "eval" / "mine-2" / "eval.json").read_text())["examples"] == 3
    assert main([*command[:-1], "train[:1]"]) == 0
    assert json.loads((run / "eval" / "mine+train_-1" / "eval.json").read_text())["examples"] == 1
    assert (run / "eval.json").read_bytes() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--eval.files", "MINE", "--eval.split", "validation"],
            "eval.split 'validation' does not exist: choose train",
        ),
        (
            ["--eval.files", "nowhere.json"],
            "cannot read the conversations of nowhere.json: No such file",
        ),
        (["--eval.files", "EMPTY"], "empty.json is empty"),
    ],
)
def test_files_that_cannot_be_evaluated_are_refused_before_anything_is_written(
    options, message, run, folder, capsys
):
    (folder / "empty.json").write_text("\n")
    paths = {"MINE": str(folder / "mine.json"), "EMPTY": str(folder / "empty.json")}
    assert (
        main(["eval", "--workdir", str(run), *(paths.get(option, option) for option in options)])
        == 2
    )
    assert message in capsys.readouterr().err
    assert not list((run / "eval").glob("*/eval.json"))


def test_a_training_is_evaluated_on_the_files_that_are_asked_for(folder, tmp_path):
    options = ["--eval.files", str(folder / "mine.json"), "--eval.split", ""]
    assert (
        main(["--config", str(folder / "config.py"), "--workdir", str(tmp_path / "run"), *options])
        == 0
    )
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (scores["files"], scores["examples"]) == ([str(folder / "mine.json")], 3)


def test_other_data_under_the_same_name_is_refused_and_the_same_data_continues(run, folder, capsys):
    shutil.rmtree(run / "checkpoints" / "2")
    text = (folder / "talks.json").read_text()
    try:
        (folder / "talks.json").write_text(text.replace("no image", "nothing"))
        assert main(["--config", str(folder / "config.py"), "--workdir", str(run)]) == 2
        error = capsys.readouterr().err
        assert "trained on other data" in error
        assert f"{folder}/talks.json of data.files" in error
        assert "another --workdir" in error
    finally:
        (folder / "talks.json").write_text(text)
    assert not (run / "checkpoints" / "2").exists()
    assert (
        main(
            [
                "--config",
                str(folder / "config.py"),
                "--workdir",
                str(run),
                "--data.dir",
                str(run / "sets"),
            ]
        )
        == 0
    )
    assert "continuing from step 1" in capsys.readouterr().out


def test_a_run_without_a_fingerprint_continues_and_gets_one(run, folder):
    kept = (run / "data.json").read_bytes()
    (run / "data.json").unlink()
    assert main(["--workdir", str(run), "--eval.split", "train[:2]"]) == 0
    assert (run / "data.json").read_bytes() == kept
