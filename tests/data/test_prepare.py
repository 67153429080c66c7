"""What Beam prepares is what a training would have prepared, and finds."""

import os
import subprocess
import sys

import pytest

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


def test_what_beam_prepares_is_found(tmp_path):
    pytest.importorskip("apache_beam", reason="pip install -r requirements-beam.txt")
    (tmp_path / "talks.py").write_text(CONFIG.format(folder=str(tmp_path / "talks")))
    command = [sys.executable, "-m", "vlm_jax.data.prepare", "--config", str(tmp_path / "talks.py")]
    command += ["--", "--runner=DirectRunner"]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "6 conversations are prepared" in done.stdout
    data = write_conversations(tmp_path / "talks", 6)
    on_beam = conversations.load(data, "train")
    elsewhere = conversations.load(write_conversations(tmp_path / "plain", 6), "train")
    assert list(on_beam) == list(elsewhere)
    assert [on_beam.image(i) for i in range(6)] == [elsewhere.image(i) for i in range(6)]
