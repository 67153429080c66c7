"""What Beam prepares is what a training would have prepared, and finds."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from vlm_jax.config import Data, Source
from vlm_jax.data import conversations, prepare
from vlm_jax.testing import write_conversations

# Runs the command for several configs in one process: importing Beam takes seconds.
COMMANDS = """
import sys
from vlm_jax.data import prepare
for config in sys.argv[1:]:
    print(config, prepare.main(["--config", config, "--", "--runner=DirectRunner"]))
"""


def test_a_source_that_needs_no_beam_is_refused(tmp_path, capsys):
    (tmp_path / "tiny.py").write_text("from vlm_jax.testing import tiny\nget_config = tiny\n")
    assert prepare.main(["--config", str(tmp_path / "tiny.py")]) == 2
    assert "data.source easy_vqa needs no Beam" in capsys.readouterr().err


@pytest.fixture(scope="module")
def on_beam(tmp_path_factory):
    """Conversations with broken and with whole images, prepared by Beam's local runner.

    Then mixtures: whole conversations, which are prepared by then, with others and with broken
    ones.
    """
    pytest.importorskip("apache_beam", reason="pip install -r requirements-beam.txt")
    folder = tmp_path_factory.mktemp("beam")
    imports = "from vlm_jax.config import Data, Source\nfrom vlm_jax.testing import tiny\n"
    configs, sources = [], {}

    def add_config(name: str, data: Data) -> None:
        configs.append(folder / f"{name}.py")
        configs[-1].write_text(f"{imports}get_config = lambda: tiny(data={data})\n")

    for name, count in {"broken": 6, "whole": 6, "more": 4}.items():
        data = replace(write_conversations(folder / name, count), text_length=40)
        sources[name] = Source(name, files=data.files, image_dir=data.image_dir)
        if name != "more":
            add_config(name, data)
    mixed = replace(data, files=(), image_dir="", dir=str(folder / "whole" / "datasets"))
    for other in ("more", "broken"):
        add_config(f"with_{other}", replace(mixed, mixture=(sources["whole"], sources[other])))
    for name in ("1_0.jpg", "5_1.png"):
        path = folder / "broken" / name
        path.write_bytes(path.read_bytes()[:60])
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *map(str, configs)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    return folder, done


def test_beam_names_all_broken_images_at_once(on_beam):
    folder, done = on_beam
    assert f"{folder}/broken.py 2\n" in done.stdout
    assert "Traceback" not in done.stderr
    message = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert message.startswith(
        f"error: 2 of 6 images in data.image_dir {folder}/broken cannot be used: image "
    )
    assert message.endswith("; repair or replace them and run the same command again.")
    for name, talk in (("1_0.jpg", 1), ("5_1.png", 5)):
        assert re.search(
            f"image {name} is not a readable image: [^;]* \\(record 'talk {talk}'\\)", message
        )


def test_a_mixture_is_prepared_and_an_error_names_its_source(on_beam, capsys):
    folder, done = on_beam
    assert f"{folder}/with_more.py 0\n" in done.stdout, done.stderr
    assert f"10 conversations are prepared in {folder}/whole/datasets" in done.stdout
    for name, count in {"whole": 6, "more": 4}.items():
        files, shared = (f"{folder}/{name}/talks.json",), f"{folder}/whole/datasets"
        data = Data(source="conversations", files=files, image_dir=f"{folder}/{name}", dir=shared)
        assert len(conversations.load(data, "train")) == count
    assert "preparing" not in capsys.readouterr().out
    assert f"{folder}/with_broken.py 2\n" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors[-1].startswith("error: data.mixture broken: 2 of 6 images in data.image_dir")


def test_what_beam_prepares_is_found(on_beam, tmp_path, capsys):
    folder, done = on_beam
    assert f"{folder}/whole.py 0\n" in done.stdout, done.stderr
    assert "6 conversations are prepared" in done.stdout
    talks = folder / "whole"
    data = Data(
        source="conversations",
        files=(str(talks / "talks.json"),),
        image_dir=str(talks),
        dir=str(talks / "datasets"),
    )
    from_beam = conversations.load(data, "train")
    assert "preparing" not in capsys.readouterr().out
    elsewhere = conversations.load(write_conversations(tmp_path / "plain", 6), "train")
    assert list(from_beam) == list(elsewhere)
    assert [from_beam.image(i) for i in range(6)] == [elsewhere.image(i) for i in range(6)]
