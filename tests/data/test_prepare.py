"""What Beam prepares is what a training would have prepared, and finds."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from vlm_jax.config import Data
from vlm_jax.data import conversations, prepare
from vlm_jax.testing import write_conversations

CONFIG = """
from dataclasses import replace
from pathlib import Path
from vlm_jax.testing import tiny, write_conversations

def get_config():
    return tiny(data=replace(write_conversations(Path({folder!r}), 6), text_length=40))
"""


def test_a_source_that_needs_no_beam_is_refused(tmp_path, capsys):
    (tmp_path / "tiny.py").write_text("from vlm_jax.testing import tiny\nget_config = tiny\n")
    assert prepare.main(["--config", str(tmp_path / "tiny.py")]) == 2
    assert "data.source easy_vqa needs no Beam" in capsys.readouterr().err


def on_beam(config):
    """Runs the preparation of a config by Beam's local runner."""
    pytest.importorskip("apache_beam", reason="pip install -r requirements-beam.txt")
    command = [
        sys.executable,
        "-m",
        "vlm_jax.data.prepare",
        "--config",
        str(config),
        "--",
        "--runner=DirectRunner",
    ]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )


def test_beam_names_all_broken_images_at_once(tmp_path):
    data = replace(write_conversations(tmp_path, 6), text_length=40)
    config = tmp_path / "talks.py"
    imports = "from vlm_jax.config import Data\nfrom vlm_jax.testing import tiny\n"
    config.write_text(f"{imports}get_config = lambda: tiny(data={data})\n")
    for name in ("1_0.jpg", "5_1.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    done = on_beam(config)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(
        f"error: 2 of 6 images in data.image_dir {tmp_path} cannot be used: image "
    )
    assert message.endswith("; repair or replace them, and the same command continues.")
    for name, talk in (("1_0.jpg", 1), ("5_1.png", 5)):
        assert re.search(
            f"image {name} is not a readable image: [^;]* \\(record 'talk {talk}'\\)", message
        )


def test_what_beam_prepares_is_found(tmp_path):
    config = tmp_path / "talks.py"
    config.write_text(CONFIG.format(folder=str(tmp_path / "talks")))
    done = on_beam(config)
    assert done.returncode == 0, done.stderr
    assert "6 conversations are prepared" in done.stdout
    talks = tmp_path / "talks"
    files, folders = (
        (str(talks / "talks.json"),),
        {"image_dir": str(talks), "dir": str(talks / "datasets")},
    )
    from_beam = conversations.load(Data(source="conversations", files=files, **folders), "train")
    elsewhere = conversations.load(write_conversations(tmp_path / "plain", 6), "train")
    assert list(from_beam) == list(elsewhere)
    assert [from_beam.image(i) for i in range(6)] == [elsewhere.image(i) for i in range(6)]
