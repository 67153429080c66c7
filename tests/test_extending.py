"""The recipes of docs/extending.md, applied as written to a copy of the package, work together."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n# (\S+\.py)(?:, in (\w+))?\n(.*?)^```", re.M | re.S)
STARCODER2 = Starcoder2Config(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=0,
)


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the package with the edits of every recipe."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "vlm_jax", folder / "vlm_jax")
    blocks = BLOCK.findall((ROOT / "docs/extending.md").read_text())
    tables = {file: table for file, table, _ in blocks if table}
    for file, table, code in blocks:
        path = folder / file
        if table:
            insert_row(path, table, code)
        elif path.exists():
            insert_code(path, tables.get(file), code)
        else:
            path.write_text(code)
    return folder


def insert_row(path: Path, table: str, code: str) -> None:
    text, count = re.subn(
        rf"^({table}\b.*?= [{{(])",
        lambda match: f"{match[1]}\n{code}",
        path.read_text(),
        flags=re.M,
    )
    assert count == 1, f"{path} has {count} tables {table}"
    path.write_text(text)


def insert_code(path: Path, table: str | None, code: str) -> None:
    """Adds code above the table of its file, or at the end."""
    text = path.read_text()
    start = re.search(rf"^{table}\b", text, re.M).start() if table else len(text)
    path.write_text(f"{text[:start]}\n{code}\n\n{text[start:]}")


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vlm_jax", *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder), "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def run(folder: Path, *arguments: str) -> None:
    done = start(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def refuse(folder: Path, *arguments: str) -> str:
    done = start(folder, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def test_a_run_uses_every_recipe(extended, datasets_dir):
    options = {
        "projector.kind": "max_pool",
        "fusion.kind": "dense_hybrid",
        "optim.kind": "lion",
        "vision.depth": "1",
        "decoder.depth": "2",
        "train.steps": "2",
        "train.batch_size": "2",
        "eval.max_examples": "4",
        "eval.metrics": "exact_match first_word",
        "data.dir": datasets_dir,
    }
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", *value.split()]
    config_file = ROOT / "configs/easy_vqa/unified.py"
    run(extended, "train", "--config", str(config_file), "--workdir", "run", *arguments)
    scores = json.loads((extended / "run/eval.json").read_text())
    assert scores["metrics"]["first_word"]["source"] == "this page"
    names = {"first_word", "image_shuffled_first_word", "first_word_by_type"}
    assert {"exact_match", "first_word_interval", *names} <= set(scores)
    config = json.loads((extended / "run/config.json").read_text())
    assert config["projector"]["kind"] == "max_pool"
    with_factor_3 = [*arguments, "--projector.factor", "3"]
    message = refuse(extended, "plan", "--config", str(config_file), *with_factor_3)
    assert "projector.factor 3" in message


def test_the_new_form_of_conversations_is_recognized(extended):
    (extended / "a.captions").write_text("a.png\ta cat\n")
    code = (
        "from vlm_jax.data.forms.files import read_files; "
        "(record,) = read_files(('a.captions',)); "
        "assert (record.images, record.turns) == (('a.png',), ('<image>', 'a cat')), record"
    )
    environment = os.environ | {"PYTHONPATH": str(extended)}
    subprocess.run([sys.executable, "-c", code], cwd=extended, env=environment, check=True)


def test_the_new_family_has_the_outputs_of_transformers(extended, tmp_path):
    torch.manual_seed(0)
    model = Starcoder2ForCausalLM(STARCODER2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "starcoder2")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    reference = {"text/in/input_ids": ids.numpy(), "text/out/logits": logits.numpy()}
    np.savez(tmp_path / "reference.npz", **reference)
    folder = str(tmp_path / "starcoder2")
    run(extended, "verify", "--checkpoint", folder, "--reference", str(tmp_path / "reference.npz"))
