"""LoRA teaches tiny public models the captions of 64 pictures; shuffled pictures give chance."""

import json

import pytest
import torch
from PIL import Image

from tests.hub import tiny_checkpoints
from vlm_jax.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

# A caption names the colors of both halves of its picture.
COLORS = {
    "red": (220, 20, 30),
    "blue": (30, 40, 220),
    "green": (20, 160, 60),
    "yellow": (240, 230, 40),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
    "pink": (250, 120, 200),
    "gray": (120, 120, 120),
}
SIDE_PX = 32
# Kernels with adapters, rank and learning rate; the encoder is frozen, the projector trained.
SETTINGS = {
    "llava": (("decoder",), 16, 0.02),
    "mllama": (("decoder", "cross_attention"), 16, 0.02),
    "paligemma": (("decoder",), 16, 0.02),
    "vit_gpt2": (("decoder", "cross_attention"), 16, 0.03),
}


def write_captions(folder) -> None:
    """Writes 64 pictures and `captions.json`: no two captions are equal."""
    records = []
    for left, left_color in COLORS.items():
        for right, right_color in COLORS.items():
            picture = Image.new("RGB", (SIDE_PX, SIDE_PX), left_color)
            picture.paste(right_color, (SIDE_PX // 2, 0, SIDE_PX, SIDE_PX))
            name = f"{left}_{right}.png"
            picture.save(folder / name)
            # One question for all: it tells nothing about the answer.
            records.append({"image": name, "question": "describe", "answer": f"{left} {right}"})
    (folder / "captions.json").write_text(json.dumps(records))


@pytest.mark.parametrize("name", SETTINGS)
def test_captions_are_learned_and_lost_when_the_pictures_are_shuffled(name, tmp_path):
    targets, rank, rate = SETTINGS[name]
    base, workdir = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    torch.manual_seed(0)
    getattr(tiny_checkpoints, name)(base)
    write_captions(tmp_path)
    data = {"files": tmp_path / "captions.json", "image_dir": tmp_path, "dir": tmp_path / "sets"}
    options = {f"data.{key}": value for key, value in data.items()}
    options |= {
        "data.text_length": 48,
        "lora.rank": rank,
        "optim.learning_rate": rate,
        "optim.lr_mult.vision": 0,
        "optim.warmup_steps": 10,
        "train.steps": 200,
        "train.batch_size": 64,
        "train.checkpoint_every_steps": 200,
        "eval.batch_size": 64,
        "eval.max_new_tokens": 16,
        "workdir": workdir,
    }
    arguments = [str(x) for key, value in options.items() for x in (f"--{key}", value)]
    arguments += ["--lora.targets", *targets, "--eval.split", "train"]
    assert main(["train", "--checkpoint", str(base), *arguments]) == 0
    assert main(["eval", "--workdir", str(workdir)]) == 0
    scores = json.loads((workdir / "eval.json").read_text())
    assert scores["examples"] == len(COLORS) ** 2
    assert scores["exact_match"] == 1
    assert scores["image_shuffled_exact_match"] <= 1 / len(COLORS)
