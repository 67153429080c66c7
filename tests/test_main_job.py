"""The full run of each config from the command line: promised scores on easy-VQA, and times."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISES = {  # config: (exact match, minutes on two cores)
    "easy_vqa/unified": (0.99, 20),
    "easy_vqa/cross_attention": (0.99, 20),
    "easy_vqa/encoder_decoder": (0.99, 20),
    "easy_vqa/encoder_free": (0.97, 25),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISES)
def test_a_config_keeps_its_promise(name, tmp_path, datasets_dir):
    exact_match, minutes = PROMISES[name]
    command = [sys.executable, "run.py", "--config", f"configs/{name}.py"]
    command += ["--workdir", str(tmp_path / name), "--data.dir", datasets_dir]
    of_a_user = {
        key: value for key, value in os.environ.items() if key != "XLA_FLAGS"
    }  # not the tests' 8 devices
    begun = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=of_a_user, check=True)
    took = (time.monotonic() - begun) / 60
    scores = json.loads((tmp_path / name / "eval.json").read_text())
    print(f"{name}: {scores} in {took:.1f} minutes")
    assert scores["exact_match"] >= exact_match
    assert scores["image_shuffled_exact_match"] <= 0.70
    assert took <= minutes
