"""The command line end to end on a tiny run: train, eval, generate, continue; rejected commands."""

import base64
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vlm_jax.cli.main import main
from vlm_jax.config import NonFiniteError
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.train import loop

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = """
from dataclasses import replace

from vlm_jax.config import Data, Eval, Train
from vlm_jax.testing import tiny


def get_config():
    cfg = tiny("cross_attention")
    return replace(
        cfg,
        data=Data(
            dir={datasets_dir!r}, train_split="train[:40]", questions_per_row=3, text_length=100
        ),
        vision=replace(cfg.vision, image_size_px=64, patch_size_px=16),
        decoder=replace(cfg.decoder, max_positions=128),
        train=Train(steps=4, batch_size=8, checkpoint_every_steps=2, log_every_steps=1),
        eval=Eval(split="test", max_examples=20, batch_size=8, max_new_tokens=3),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, datasets_dir):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "small.py").write_text(CONFIG.format(datasets_dir=datasets_dir))
    rng = np.random.default_rng(0)
    for name in ("cat.png", "dog.png"):
        Image.fromarray(rng.integers(0, 255, (50, 70, 3), np.uint8)).save(folder / name)
    (folder / "cut.png").write_bytes((folder / "cat.png").read_bytes()[:2000])
    (folder / "text.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """The work folder of a run that `train` made; tests leave it as it is."""
    assert main(["--config", str(folder / "small.py"), "--workdir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_train_leaves_everything_in_the_work_folder(trained):
    workdir = Workdir(str(trained))
    made = {path.name for path in trained.iterdir()}
    assert made >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "eval.json",
        "predictions.jsonl",
        "samples.png",
    }
    assert list(workdir.tensorboard.glob("events.*"))
    assert len(workdir.metrics.read_text().splitlines()) == 4
    scores = json.loads(workdir.eval.read_text())
    described = {"split", "files", "examples", "step", "max_new_tokens"}
    numbers = {"exact_match", "by_type", "image_shuffled_exact_match"}
    intervals = {"exact_match_interval", "by_type_intervals"}
    assert set(scores) == described | numbers | intervals | {"metrics"}
    assert (scores["examples"], scores["step"], scores["max_new_tokens"]) == (20, 4, 3)
    assert Image.open(workdir.samples).size


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_eval_scores_again_in_a_folder_of_its_own_and_says_where_the_pictures_are(run, capsys):
    before = files_of(run)
    assert main(["eval", "--workdir", str(run)]) == 0
    assert files_of(run) == before
    scores = json.loads((run / "eval" / "test_20" / "eval.json").read_text())
    assert scores == json.loads((run / "eval.json").read_text())
    assert (run / "eval" / "test_20" / "predictions.jsonl").read_bytes() == before[
        "predictions.jsonl"
    ]
    cut, right, shuffled, score, pictures = capsys.readouterr().out.splitlines()
    assert "of 20 answers are longer than eval.max_new_tokens" in cut
    assert (right, shuffled) == ("evaluating: 20 questions", "with shuffled images: 20 questions")
    assert f"{scores['exact_match']:.4f} (95 % interval 0." in score
    assert "on 20 questions of test" in score
    assert f"{scores['image_shuffled_exact_match']:.4f} with shuffled images" in score
    assert str(run / "eval" / "test_20" / "samples.png") in pictures


def test_eval_takes_another_split_and_keeps_every_evaluation_with_other_settings(run, capsys):
    command = [
        "eval",
        "--workdir",
        str(run),
        "--eval.split",
        "train[:10]",
        "--eval.max-examples",
        "5",
    ]
    assert main(command) == 0
    assert "on 5 questions of train[:10]" in capsys.readouterr().out
    assert (
        json.loads((run / "eval" / "train_-10_5" / "eval.json").read_text())["split"]
        == "train[:10]"
    )
    before = files_of(run / "eval" / "train_-10_5")
    assert main([*command, "--eval.max_new_tokens", "2"]) == 0
    assert (
        json.loads((run / "eval" / "train_-10_5-2" / "eval.json").read_text())["max_new_tokens"]
        == 2
    )
    assert main([*command, "--eval.batch_size", "4"]) == 0, "the same questions in other batches"
    assert files_of(run / "eval" / "train_-10_5")["settings.json"] == before["settings.json"]
    assert sorted(path.name for path in (run / "eval").iterdir()) == [
        "train_-10_5",
        "train_-10_5-2",
    ]


def test_generate_asks_every_prompt_about_every_image(trained, folder, capsys):
    images, prompts = (
        [str(folder / "cat.png"), str(folder / "dog.png")],
        ["is it red ?", "what shape is there in it ?"],
    )
    arguments = ["generate", "--workdir", str(trained), "--image", *images, "--prompt", *prompts]
    assert main(arguments) == 0
    lines = capsys.readouterr().out
    expected = [f"{image}  {prompt}  " for image in images for prompt in prompts]
    places = [lines.index(start) for start in expected]
    assert places == sorted(places)


def test_generate_needs_no_dataset(run, folder, capsys):
    cfg = json.loads((run / "config.json").read_text())
    cfg["data"]["dir"] = "/proc/nowhere"
    (run / "config.json").write_text(json.dumps(cfg))
    assert (
        main(
            [
                "generate",
                "--workdir",
                str(run),
                "--image",
                str(folder / "cat.png"),
                "--prompt",
                "is it ?",
            ]
        )
        == 0
    )


@pytest.mark.parametrize("name", ["missing.png", "cut.png", "text.png"])
def test_a_file_that_is_no_image_is_named(name, trained, folder, capsys):
    files = [str(folder / "cat.png"), str(folder / name)]
    assert (
        main(["generate", "--workdir", str(trained), "--image", *files, "--prompt", "is it red ?"])
        == 2
    )
    out, err = capsys.readouterr()
    assert str(folder / name) in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_eval_without_a_split_is_refused(trained, capsys):
    assert main(["eval", "--workdir", str(trained), "--eval.split", ""]) == 2
    assert "eval.split is empty, so there is nothing to evaluate" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_refused(trained, folder, capsys):
    arguments = [
        "generate",
        "--workdir",
        str(trained),
        "--image",
        str(folder / "cat.png"),
        "--prompt",
        "red " * 200,
    ]
    assert main(arguments) == 2
    assert "decoder.max_positions 128" in capsys.readouterr().err


def test_look_shows_the_answer_of_generate_for_one_model_and_for_two(
    trained, folder, tmp_path, capsys
):
    asked = ["--workdir", str(trained), "--image", str(folder / "cat.png"), "--prompt", "red ?"]
    assert main(["generate", *asked]) == 0
    answer = capsys.readouterr().out.rstrip("\n").split("red ?  ", 1)[1]
    options = ["--against", str(trained), "--method", "rollout", "--output", str(tmp_path / "maps")]
    assert main(["look", *asked, *options]) == 0
    name = "run (cross_attention)"
    assert f"{name}: {answer}\n{name}: {answer}\n" in capsys.readouterr().out
    assert Image.open(tmp_path / "maps" / "look.png").size
    page = (tmp_path / "maps" / "look.html").read_text()
    assert "://" not in page, "the page needs no network"
    panels = json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])
    assert len(panels) == 2 and panels[0] == panels[1]
    assert "".join(panels[0]["words"]).strip() in (answer, "(end)")
    assert panels[0]["layers"] == ["cross 0", "cross 1"]
    image, words = panels[0]["images"][0], len(panels[0]["words"])
    assert (image["rows"], image["columns"]) == (4, 4)
    peaks = np.frombuffer(base64.b64decode(panels[0]["weights"]["peaks"]), "<f4")
    steps = np.frombuffer(base64.b64decode(panels[0]["weights"]["steps"]), np.uint8)
    maps = peaks[:, None] * steps.reshape(len(peaks), 16) / 255
    assert len(peaks) == words * 2 * 4
    np.testing.assert_allclose(maps.sum(1), 1, atol=0.02)
    assert set(panels[0]["combined"]) == {"rollout"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--image": None}, "look needs --image FILE."),
        ({"--prompt": None}, "look needs --prompt"),
        ({"--workdir": None}, "look needs --workdir DIR"),
        ({"--against": "missing"}, "missing"),
        ({"--method": "median"}, "median"),
        ({"--image": "text.png"}, "text.png"),
    ],
)
def test_look_names_a_mistake_and_writes_nothing(
    trained, folder, tmp_path, capsys, changes, message
):
    options = {
        "--workdir": str(trained),
        "--image": "cat.png",
        "--prompt": "red ?",
        "--output": str(tmp_path / "maps"),
        **changes,
    }
    if options["--image"]:
        options["--image"] = str(folder / options["--image"])
    given = [text for pair in options.items() if pair[1] for text in pair]
    assert main(["look", *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "maps").exists()


def test_eval_measures_the_attention_on_the_shape(run):
    options = ["--eval.metrics", "exact_match", "grounding", "--eval.max_examples", "10"]
    assert main(["eval", "--workdir", str(run), *options]) == 0
    (file,) = (run / "eval").glob("*/eval.json")
    scores = json.loads(file.read_text())
    assert scores["grounding_examples"] == 10
    assert scores["grounding_image"] == pytest.approx(1)
    assert 0 < scores["grounding_area"] < 0.5
    layers = scores["grounding_by_layer"]
    assert list(layers) == ["cross 0", "cross 1"]
    mass = np.mean([numbers["mass"] for numbers in layers.values()])
    assert scores["grounding"] == pytest.approx(mass)
    assert "image_shuffled_grounding" in scores


def test_generate_falls_back_to_the_last_whole_checkpoint(run, folder, capsys):
    shutil.rmtree(run / "checkpoints" / "4" / "state")
    assert (
        main(
            [
                "generate",
                "--workdir",
                str(run),
                "--image",
                str(folder / "cat.png"),
                "--prompt",
                "is it ?",
            ]
        )
        == 0
    )
    assert "checkpoint 4 is damaged" in capsys.readouterr().out


def test_starting_again_continues(run, folder, capsys):
    shutil.rmtree(run / "checkpoints" / "4")
    assert main(["train", "--config", str(folder / "small.py"), "--workdir", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"continuing from step 2 in {run}" in out
    assert "step 4/4" in out
    assert "exact match" in out
    assert main(["--workdir", str(run)]) == 0, "the work folder alone says what to continue"


def test_another_config_is_refused_and_the_run_is_kept(run, folder, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert (
        main(["--config", str(folder / "small.py"), "--workdir", str(run), "--train.steps", "9"])
        == 2
    )
    assert "train.steps: 4 -> 9" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_is_not_finite_ends_with_code_1(folder, tmp_path, capsys, monkeypatch):
    def train(cfg, prepare_scores):
        raise NonFiniteError("step 2: the loss is nan")

    monkeypatch.setattr(loop, "train", train)
    assert main(["--config", str(folder / "small.py"), "--workdir", str(tmp_path / "bad")]) == 1
    assert capsys.readouterr().err == "error: step 2: the loss is nan\n"


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_logits_that_are_not_finite_end_with_code_1_and_name_the_prompt(
    run, folder, capsys, monkeypatch, verb
):
    def damaged(cfg, params):
        return jax.tree.map(lambda x: x * np.nan, params)

    monkeypatch.setattr("vlm_jax.infer.run.cast_to_compute_dtype", damaged)
    before = (run / "eval.json").read_bytes()
    asks = (
        ["--image", str(folder / "cat.png"), "--prompt", "is it red ?"]
        if verb == "generate"
        else []
    )
    assert main([verb, "--workdir", str(run), *asks]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the logits of token 1 of '")
    assert "are NaN or infinite" in error
    assert (run / "eval.json").read_bytes() == before
    assert not list(run.glob("eval/*/*")), "nothing is written"


def test_no_checkpoint_is_a_sentence(run, folder, capsys):
    shutil.rmtree(run / "checkpoints")
    assert main(["eval", "--workdir", str(run)]) == 2
    assert "checkpoint" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()
