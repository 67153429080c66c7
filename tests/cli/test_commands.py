"""The command line: a mistake gives one sentence that names it and exit code 2, and no files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_jax
from tests.cli.program import CONFIG, run
from vlm_jax import config
from vlm_jax.cli import generate
from vlm_jax.cli.main import COMMANDS
from vlm_jax.cli.options import parse_options
from vlm_jax.config import files, hints, validate
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import tiny

pytestmark = pytest.mark.usefixtures("folder")

OTHER = CONFIG.replace("unified", "cross_attention")


MISTAKES = {
    "an unknown verb": (
        ["tarin", "--config", CONFIG],
        ["unknown command 'tarin'", "perhaps you meant train", "generate"],
    ),
    "a verb that is nothing like one": (
        ["xyz"],
        [
            "unknown command 'xyz'",
            "choose train, eval, data, score, generate, look, chat, serve, demo, verify, export",
        ],
    ),
    "no config": (["train"], ["train needs --config"]),
    "a config that is not there": (
        ["train", "--config", CONFIG.replace("unified", "unifid")],
        ["does not exist", "perhaps you meant", "easy_vqa/unified.py"],
    ),
    "an unknown field": (
        ["--config", CONFIG, "--decoder.widht", "32"],
        ["--decoder.widht", "perhaps you meant decoder.width"],
    ),
    "a file without --config": (
        [CONFIG],
        [f"unknown command '{CONFIG}'", f"perhaps you meant --config {CONFIG}"],
    ),
    "a config without its folder": (
        ["train", "--config", "easy_vqa_unified"],
        ["--config easy_vqa_unified does not exist", f"perhaps you meant {CONFIG}"],
    ),
    "a folder of a run for a config": (["--config", "run"], ["--workdir run", "--checkpoint run"]),
    "a name on the hub for a folder": (
        ["generate", "--checkpoint", "llava-hf/llava-1.5-7b-hf", "--prompt", "hi"],
        [
            "is not a folder",
            "hf download llava-hf/llava-1.5-7b-hf --local-dir checkpoints/llava-1.5-7b-hf",
        ],
    ),
    "a name on the hub for a part": (
        ["plan", "--config", CONFIG, "--vision.checkpoint", "openai/clip-vit-base-patch32"],
        [
            "is not a folder",
            "hf download openai/clip-vit-base-patch32 "
            "--local-dir checkpoints/clip-vit-base-patch32",
        ],
    ),
    "an unknown option of a checkpoint's verb": (
        ["verify", "--model", "x"],
        ["verify has no option --model (perhaps you meant checkpoint)", "--reference"],
    ),
    "an unknown choice": (
        ["--config", CONFIG, "--fusion.kind", "crossattention"],
        ["fusion.kind", "perhaps you meant cross_attention"],
    ),
    "a value of another type": (
        ["--config", CONFIG, "--train.steps", "many"],
        ["--train.steps many is not a whole number"],
    ),
    "a word for a number": (
        ["--config", CONFIG, "--seed=0", "--optim.beta1", "x"],
        ["--optim.beta1 x is not a number"],
    ),
    "a word for yes or no": (
        ["--config", CONFIG, "--fusion.gated", "maybe"],
        ["fusion.gated", "True, False"],
    ),
    "a choice among several": (
        ["--config", CONFIG, "--data.augment", "turn", "miror"],
        ["--data.augment miror", "perhaps you meant mirror"],
    ),
    "a field without a value": (
        ["--config", CONFIG, "--train.steps"],
        ["--train.steps takes one value, not none"],
    ),
    "two values of one": (
        ["--config", CONFIG, "--seed", "1", "2"],
        ["--seed takes one value, not 1 2"],
    ),
    "too few values": (
        ["--config", CONFIG, "--data.special_ids", "1"],
        ["--data.special_ids takes 4 values, with spaces between them, not 1"],
    ),
    "half a pair": (
        ["--config", CONFIG, "--vision.tile_layouts", "1", "1", "2"],
        ["--vision.tile_layouts takes 2 values each, with spaces between them, not 1 1 2"],
    ),
    "a word in a pair": (
        ["--config", CONFIG, "--vision.tile_layouts", "1", "x"],
        ["--vision.tile_layouts x is not a whole number"],
    ),
    "a value of nothing": (["train", "steps", "--config", CONFIG], ["'steps' is not an option"]),
    "a short option": (["--config", CONFIG, "-x"], ["'-x' is not an option"]),
    "an empty value": (["--config", CONFIG, "--data.dir", ""], ["--data.dir is empty"]),
    "an empty work folder": (["--config", CONFIG, "--workdir", ""], ["--workdir is empty"]),
    "a work folder left out": (
        ["--config", CONFIG, "--workdir"],
        ["--workdir", "expected one argument"],
    ),
    "a config left out": (["--config"], ["--config", "expected one argument"]),
    "a folder for a config": (
        ["--config", str(Path(CONFIG).parent)],
        ["is not a config", "Python file"],
    ),
    "a number that is none": (
        ["--config", CONFIG, "--optim.learning_rate", "nan"],
        ["optim.learning_rate is nan: it must be at least 0"],
    ),
    "a number without end": (
        ["--config", CONFIG, "--optim.clip_norm", "inf"],
        ["optim.clip_norm is inf: it must be a finite number"],
    ),
    "a value that is too small": (
        ["--config", CONFIG, "--train.steps", "0"],
        ["train.steps is 0", "at least 1"],
    ),
    "steps that are no range": (
        ["--config", CONFIG, "--train.profile-steps", "13:10"],
        ["train.profile_steps '13:10' is not a range of steps", "10:13"],
    ),
    "steps that never come": (
        ["--config", CONFIG, "--train.steps", "9", "--train.profile-steps", "8:10"],
        ["train.profile_steps 8:10 ends after train.steps 9"],
    ),
    "values that do not fit": (
        ["--config", CONFIG, "--vision.patch-size-px", "7"],
        ["vision.image_size_px 64", "vision.patch_size_px 7"],
    ),
    "a work folder that holds no run": (
        ["train", "--workdir", "nowhere"],
        ["--workdir nowhere is not a run"],
    ),
    "eval without a work folder": (["eval"], ["eval needs --workdir"]),
    "eval of a config": (["eval", "--config", CONFIG], ["eval needs --workdir"]),
    "eval of a run and a config": (
        ["eval", "--workdir", "run", "--config", CONFIG],
        ["and no --config"],
    ),
    "eval of another model": (
        ["eval", "--workdir", "run", "--eval.max-examples", "9", "--decoder.width", "64"],
        ["eval cannot change decoder.width: 32 -> 64: only fields of data, mesh, "],
    ),
    "two folders to begin with": (
        ["train", "--checkpoint", "a", "--init_from", "b"],
        ["--checkpoint and --init_from name one folder, not a and b"],
    ),
    "eval of nothing": (["eval", "--workdir", "nowhere"], ["nowhere is not a run"]),
    "generate without a work folder": (
        ["generate", "--image", "a.png", "--prompt", "hi"],
        ["generate needs --workdir"],
    ),
    "generate without an image": (
        ["generate", "--workdir", "run", "--prompt", "hi"],
        ["generate needs --image"],
    ),
    "generate without a prompt": (
        ["generate", "--workdir", "run", "--image", "a.png"],
        ["--prompt"],
    ),
    "an image flag without a file": (
        ["generate", "--workdir", "run", "--image", "--prompt", "hi"],
        ["--image"],
    ),
    "an image flag twice": (
        ["generate", "--workdir", "run", "--image", "a.png", "--prompt", "hi", "--image=b.png"],
        ["--image is given twice: give all values after one option"],
    ),
    "a field twice": (
        ["--config", CONFIG, "--train.steps", "9", "--train.steps", "8"],
        ["--train.steps is given twice"],
    ),
    "two configs": (["--config", CONFIG, "--config", CONFIG], ["--config is given twice"]),
    "diff of one file": (["diff", CONFIG], ["diff needs two config files"]),
    "diff with a missing file": (["diff", CONFIG, "nothing.py"], ["nothing.py does not exist"]),
}


@pytest.mark.parametrize("arguments, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_exit_code_2_and_nothing_is_written(
    arguments, said, folder, capsys
):
    if "run" in arguments:
        (folder / "run").mkdir()
        Workdir("run").config.write_text(files.to_json(tiny()))
    before = sorted(folder.rglob("*"))
    code, out, err = run(arguments, capsys)
    assert code == 2
    for words in said:
        assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "a sentence, not a page"
    assert not out
    assert sorted(folder.rglob("*")) == before


HINTS = {  # option: what was meant
    **dict.fromkeys(
        ("--lr", "--train.lr", "--learning_rate", "--learning-rate", "--LR"), "optim.learning_rate"
    ),
    **dict.fromkeys(("--optim.learning_rat", "--vision.learning_rate"), "optim.learning_rate"),
    **dict.fromkeys(("--batch_size", "--bs", "--optim.batch_size"), "train.batch_size"),
    **dict.fromkeys(("--epochs", "--steps", "--train.epochs", "--max-steps"), "train.steps"),
    **dict.fromkeys(("--output_dir", "--work_dir"), "workdir"),
    **dict.fromkeys(("--wd", "--train.weight_decay"), "optim.weight_decay"),
    **dict.fromkeys(("--warmup", "--optim.warmup"), "optim.warmup_steps"),
    "--fusion": "fusion.kind",
    "--train.seed": "seed or data.seed",
    "--vision.layers": "vision.depth",
    "--decoder.layers": "decoder.depth",
    "--decode.width": "decoder.width",
    "--width": "vision.width, projector.width or decoder.width",
    "--mesh": "mesh.data, mesh.fsdp or mesh.tensor",
}


@pytest.mark.parametrize("option, meant", HINTS.items())
def test_a_synonym_or_another_section_of_a_field_gets_a_hint(option, meant, capsys):
    code, _, err = run(["--config", CONFIG, option, "1"], capsys)
    name = option[2:].replace("-", "_")
    assert (code, err) == (
        2,
        f"error: --{name} is not a field (perhaps you meant {meant}); --help lists all of them.\n",
    )


def test_every_synonym_is_of_a_field_and_is_not_a_field_itself():
    fields = validate.kinds(config.Experiment())
    assert set(hints.SYNONYMS.values()) <= set(fields)
    assert not set(hints.SYNONYMS) & set(fields)


def test_an_option_is_spelled_with_hyphens_or_underscores():
    for option in ("--max-new-tokens", "--max_new_tokens"):
        args, _ = parse_options("generate", [option, "3"], generate.OPTIONS, "")
        assert args.max_new_tokens == 3


GENERATE_MISTAKES = {
    "two models": (
        ["--workdir", "run", "--checkpoint", "c", "--prompt", "hi"],
        "--workdir run and --checkpoint c are two models",
    ),
    "a chat template of a run": (
        ["--workdir", "run", "--no-chat", "--prompt", "hi"],
        "--no-chat applies to --checkpoint only",
    ),
    "layers of a run": (
        ["--workdir", "run", "--intermediate-layers", "input", "--prompt", "hi"],
        "--intermediate-layers applies to --checkpoint only",
    ),
    "an old name": (
        ["--checkpoint", "c", "--taps", "input", "--prompt", "hi"],
        "no option --taps (perhaps you meant intermediate-layers)",
    ),
    "a run as a checkpoint": (
        ["--checkpoint", "run", "--prompt", "hi"],
        "--checkpoint run is the folder of a run: name it with --workdir run",
    ),
    "two images at once": (
        ["--workdir", "run", "--images-per-prompt", "all", "--image", "a", "b", "--prompt", "hi"],
        "takes one image per prompt",
    ),
    "a field of a checkpoint": (
        ["--checkpoint", "c", "--eval.max_examples", "3", "--prompt", "hi"],
        "no option --eval.max-examples",
    ),
    "an option of a run with a typing error": (
        ["--workdir", "run", "--max-new-tokns", "3", "--prompt", "hi"],
        "--max_new_tokns is not a field (perhaps you meant max-new-tokens)",
    ),
    "a field of a run with a typing error": (
        ["--workdir", "run", "--eval.max_new_tokns", "3", "--prompt", "hi"],
        "(perhaps you meant eval.max_new_tokens)",
    ),
    "an option out of range": (
        ["--workdir", "run", "--temperature", "-1", "--image", "a", "--prompt", "hi"],
        "--temperature -1.0: it must be at least 0",
    ),
    "an option of sampling without a temperature": (
        ["--workdir", "run", "--top-p", "0.5", "--image", "a", "--prompt", "hi"],
        "--top-p 0.5 has no effect with --temperature 0",
    ),
    "images of a model without any": (
        ["--workdir", "blind", "--image", "a", "--prompt", "hi"],
        "--workdir blind is a text-only model: leave out --image",
    ),
}


@pytest.mark.parametrize("arguments, message", GENERATE_MISTAKES.values(), ids=GENERATE_MISTAKES)
def test_generate_names_an_option_that_does_not_apply(arguments, message, folder, capsys):
    for name, cfg in (("run", tiny()), ("blind", tiny("text_only"))):
        (folder / name).mkdir()
        Workdir(name).config.write_text(files.to_json(cfg))
    code, out, err = run(["generate", *arguments], capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["diff", CONFIG, OTHER], ["train", "--config", CONFIG, "-h"]]
)
def test_a_reader_that_has_ended_ends_the_command_in_silence(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vlm_jax", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


def test_the_version_is_printed(capsys):
    assert run(["--version"], capsys) == (0, f"{vlm_jax.__version__}\n", "")


def test_no_arguments_at_all_show_the_usage_with_exit_code_2(capsys):
    code, out, _ = run([], capsys)
    assert code == 2
    assert "usage:" in out


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (KeyboardInterrupt(), 130, "stopped\n"),
        (
            OSError(28, "No space left on device", "a.json"),
            1,
            "error: [Errno 28] No space left on device: 'a.json'\n",
        ),
        (
            ModuleNotFoundError("No module named 'tyro'", name="tyro"),
            2,
            "error: the package tyro is not installed: pip install -r requirements.txt.\n",
        ),
    ],
)
def test_what_is_no_mistake_is_a_line_too(raised, code, said, capsys, monkeypatch):
    def diff(arguments):
        raise raised

    monkeypatch.setitem(COMMANDS, "diff", diff)
    assert run(["diff", "a", "b"], capsys) == (code, "", said)


def test_diff_prints_the_fields_that_differ(capsys):
    assert run(["diff", CONFIG, OTHER], capsys) == (
        0,
        "fusion.kind: unified -> cross_attention\n",
        "",
    )


def test_diff_of_equal_configs_says_so(capsys):
    assert run(["diff", CONFIG, CONFIG], capsys) == (0, "the two configs are equal\n", "")


def test_a_work_folder_with_another_run_is_refused_and_left_as_it_is(folder):
    workdir = Workdir(str(folder / "run"))
    workdir.open(tiny())
    written = workdir.config.read_text()
    with pytest.raises(files.ConfigError, match="fusion.kind: unified -> cross_attention"):
        workdir.open(tiny("cross_attention"))
    assert workdir.config.read_text() == written
    assert workdir.read_config().fusion == tiny().fusion


def test_a_work_folder_with_checkpoints_of_nobody_knows_which_run_is_refused(folder):
    workdir = Workdir(str(folder / "run"))
    workdir.open(tiny())
    workdir.config.unlink()
    workdir.open(tiny())  # an empty folder is anybody's
    workdir.config.unlink()
    (workdir.checkpoints / "2").mkdir()
    with pytest.raises(files.ConfigError, match="run has checkpoints but no config.json"):
        workdir.open(tiny())
    assert not workdir.config.exists()


def test_a_file_where_the_checkpoints_belong_is_refused_and_left_as_it_is(folder):
    workdir = Workdir(str(folder))
    workdir.checkpoints.write_text("mine")
    with pytest.raises(files.ConfigError, match="cannot be written: File exists"):
        workdir.open(tiny())
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
