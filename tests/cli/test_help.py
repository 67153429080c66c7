"""The help lists every command, option and field, with its comment and default."""

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest

from tests.cli.program import CONFIG, run
from vlm_jax import config
from vlm_jax.cli.data import DATA_OPTIONS
from vlm_jax.cli.main import COMMANDS
from vlm_jax.cli.plan import PLAN_OPTIONS
from vlm_jax.config import files, validate

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_into_100_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for arguments in ([command, "--help"], ["--help"]):
        _, out, _ = run(arguments, capsys)
        assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("verb", ["generate", "verify", "export"])
def test_the_help_of_a_verb_about_checkpoints_has_examples(verb, capsys):
    code, out, _ = run([verb, "--help"], capsys)
    assert code == 0
    assert f"python run.py {verb} --" in out


def comments(kind) -> dict[str, str]:
    """Field -> all that the source says about it: beside it, below it with `#   `, or above it."""
    texts, above, name = {}, [], None
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = line.partition("  # ")
        if match := re.match(r"    (\w+): ", line):
            name = match[1]
            texts[name], above = [*above, comment.strip()], []
        elif line.strip().startswith("#:"):
            above.append(line.strip()[2:].strip())
        elif line.startswith("    # ") and name:
            texts[name].append(line.strip()[1:].strip())
        else:
            above = []
    return {name: " ".join(filter(None, parts)) for name, parts in texts.items()}


def test_the_help_has_the_whole_comment_of_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    mixture = str(Path(CONFIG).parents[1] / "your_data" / "mixture.py")
    _, out, _ = run(["train", "--config", mixture, "--help"], capsys)
    text = " ".join(out.replace("│", " ").split())
    sections = {config.Experiment} | set(typing.get_type_hints(config.Experiment).values())
    sections = {kind for kind in sections if dataclasses.is_dataclass(kind)}
    for kind in {*sections, config.Transformer, config.Rope, config.LrMult, config.Source}:
        found, hints_of = comments(kind), typing.get_type_hints(kind)
        for field in kind.__annotations__:
            if not dataclasses.is_dataclass(validate.element_type(hints_of[field])):
                assert found[field], f"{kind.__name__}.{field} has no comment"
                assert " ".join(found[field].split()) in text, f"{kind.__name__}.{field}"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--seed", "1", "-h"]])
def test_help_names_every_verb(arguments, capsys):
    code, out, _ = run(arguments, capsys)
    assert code == 0
    for verb in ("train", "eval", "generate", "diff"):
        assert f"\n  {verb}" in out
    assert "\nexamples:\n  python run.py --config configs/easy_vqa/unified.py\n" in out


OWN_OPTIONS = {
    "train": ["--config FILE", "--workdir DIR", "--checkpoint DIR", "--section.field VALUE"],
    "eval": ["--workdir DIR", "--checkpoint DIR", "--section.field VALUE"],
    "plan": ["--config FILE", *(f"--{name}" for name in PLAN_OPTIONS), "--section.field VALUE"],
    "data": ["--config FILE", *(f"--{name}" for name in DATA_OPTIONS), "--section.field VALUE"],
    "diff": ["python run.py diff A.py B.py"],
}


@pytest.mark.parametrize("command, options", OWN_OPTIONS.items())
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_without_an_experiment_lists_the_options_of_a_command(flag, command, options, capsys):
    code, out, err = run([command, flag], capsys)
    assert (code, err) == (0, "")
    for option in options:
        assert option in out
    if command != "diff":
        assert re.search(rf"python run.py {command} --\w+ \w+ --help\n", out)
    assert len(out.splitlines()) <= 30


@pytest.mark.parametrize("command", ["train", "eval", "data", "plan"])
@pytest.mark.parametrize("option", ["--checkpoint", "--init_from", "--init-from"])
def test_help_with_a_checkpoint_lists_the_fields(option, command, capsys):
    for arguments in ([option, "gpt2"], [f"{option}=gpt2"]):
        code, out, _ = run([command, *arguments, "--help"], capsys)
        assert code == 0
        assert "--data.image_dir STR" in out
        assert "(default: runs/gpt2)" in out


def test_help_spells_fields_with_underscores_and_both_spellings_are_accepted(capsys):
    _, out, _ = run(["train", "--config", CONFIG, "--help"], capsys)
    fields = re.findall(r"--[a-z]+\.[\w.-]+", out)
    assert len(fields) > 100
    assert not [name for name in fields if "-" in name[2:]]
    for option in ("--data.image_px", "--data.image-px"):
        cfg = files.override(config.Experiment(), [option, "32"], "program")
        assert cfg.data.image_px == 32


def test_help_of_a_verb_lists_fields_with_the_values_of_the_config(capsys):
    code, out, _ = run(["train", "--config", CONFIG, "--help"], capsys)
    assert code == 0
    assert "--fusion.kind" in out
    steps = files.load(CONFIG).train.steps
    assert f"(default: {steps})" in out  # of this config, not of the class
