"""families/README.md: its code is the source's, and one row in the registry adds a family."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from vlm_jax.hub import export
from vlm_jax.hub.families.decoders.gpt2 import GPT2
from vlm_jax.hub.families.registry import FAMILIES
from vlm_jax.hub.load import load_checkpoint
from vlm_jax.hub.save import write_model
from vlm_jax.testing import random_params

FOLDER = Path("vlm_jax/hub/families")
SOURCES = (FOLDER / "decoders/gpt2.py", Path("tests/hub/families/test_gpt2.py"))


def test_quoted_code_is_in_the_source():
    source = "\n".join(path.read_text() for path in SOURCES)
    quotes = re.findall(r"```python\n(.*?)\n```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert len(quotes) == 6
    for quote in quotes:
        assert f"\n{quote}\n" in source, quote


def test_one_row_adds_a_family(tmp_path, monkeypatch):
    """It is loaded by its model_type, and a run of its architecture is exported to it."""

    def config_to_hf(cfg):
        return GPT2.config_to_hf(cfg) | {"model_type": "my_gpt2"}

    family = replace(GPT2, model_type="my_gpt2", config_to_hf=config_to_hf)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    cfg = GPT2.config_from_hf(sizes, ())
    params = random_params(cfg)
    write_model(tmp_path, family, cfg, params)

    monkeypatch.setitem(FAMILIES, "my_gpt2", family)
    monkeypatch.setattr(export, "KNOWN", (family,))
    checkpoint, loaded = load_checkpoint(tmp_path)
    assert checkpoint.family == export.matching_family(cfg) == family
    assert checkpoint.cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
