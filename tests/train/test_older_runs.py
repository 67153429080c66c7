"""A run that an older version began is continued by this one.

`tests/golden/run_29d0ce2` is a run of commit 29d0ce2 that SIGTERM stopped after step 4 of 6, on one
device: questions about digits, cross-attention, and as many fields as possible
whose names or values are others today. `metrics_of_the_whole_run.jsonl` is of the same run of that
commit, not stopped.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.config import files
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.train import loop

OLDER = Path(__file__).parents[1] / "golden" / "run_29d0ce2"
SAME = ("step", "loss", "grad_norm", "learning_rate", "padding_fraction")


def metrics(path: Path) -> list[list[float]]:
    rows = map(json.loads, path.read_text().splitlines())
    return [[row[name] for name in SAME] for row in rows]


def test_a_run_of_29d0ce2_is_continued_to_the_same_end(tmp_path, datasets_dir, capsys):
    workdir = Workdir(str(shutil.copytree(OLDER, tmp_path / "run")))
    cfg = workdir.read_config()
    state = loop.train(replace(cfg, data=replace(cfg.data, dir=datasets_dir)))
    output = capsys.readouterr().out
    assert "continuing from step 4" in output
    assert int(state.step) == 6
    expected = metrics(OLDER / "metrics_of_the_whole_run.jsonl")
    np.testing.assert_allclose(metrics(workdir.metrics), expected, rtol=1e-4, err_msg=output)


def test_the_config_of_an_older_run_has_the_names_and_values_of_today():
    cfg = files.from_json((OLDER / "config.json").read_bytes(), "config.json")
    assert (cfg.decoder.norm, cfg.decoder.norm_position) == ("rmsnorm_zero_centered", "sandwich")
    assert cfg.decoder.layer_scale == "vector"
    assert not cfg.decoder.tie_word_embeddings
    assert cfg.fusion.tokens_without_image == "attend_all"
    assert cfg.optim.lr_mult.vision == 0.5
    assert cfg.optim.final_lr_fraction == 0.1


@pytest.mark.parametrize(
    ("section", "older", "name", "value"),
    [
        ("vision", {"global_depth": 3}, "num_global_layers", 3),
        ("vision", {"norm": "rmsnorm_centred"}, "norm", "rmsnorm_zero_centered"),
        ("vision", {"norm_order": "post"}, "norm_position", "post"),
        ("vision", {"residual_scale": "tanh"}, "layer_scale", "tanh_gate"),
        ("vision", {"qk_norm": False}, "qk_norm", "none"),
        ("decoder", {"qk_norm": True}, "qk_norm", "head"),
        ("decoder", {"tied_head": True}, "tie_word_embeddings", True),
        ("fusion", {"blind_rows": "skip"}, "tokens_without_image", "mask_out"),
        ("optim", {"kind": "muon"}, "kind", "muon"),
    ],
)
def test_an_older_field_or_value_is_read(section, older, name, value):
    config = json.loads((OLDER / "config.json").read_text())
    config[section] |= older
    cfg = files.from_json(json.dumps(config), "config.json")
    assert getattr(getattr(cfg, section), name) == value


def test_an_older_run_in_nf4_keeps_its_scales_in_float32():
    config = json.loads((OLDER / "config.json").read_text())
    config["train"]["frozen_dtype"] = "nf4"
    older = files.from_json(json.dumps(config), "config.json")
    assert older.train.frozen_format == "nf4_single"
    assert files.from_json(files.to_json(older), "config.json") == older
    config["train"]["double_quantization"] = True
    assert files.from_json(json.dumps(config), "config.json").train.frozen_format == "nf4"


@pytest.mark.parametrize("kind", ["pixel_shuffle", "average_pool", "linear"])
def test_an_older_projector_that_merges_squares_has_its_bias(kind):
    """`bias` had an effect on `linear` and `mlp` alone, before these had a `projection`."""
    config = json.loads((OLDER / "config.json").read_text())
    config["projector"] |= {"kind": kind, "bias": False}
    older = files.from_json(json.dumps(config), "config.json")
    assert older.projector.bias == (kind != "linear")
    config["projector"]["projection"] = "linear"
    assert not files.from_json(json.dumps(config), "config.json").projector.bias
