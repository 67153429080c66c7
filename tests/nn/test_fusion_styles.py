"""A fusion style is one row of `FUSION_STYLES`: a copy under another name is the same model."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from vlm_jax import axes, sharding
from vlm_jax.config import FUSION_STYLES, ConfigError, Fusion, Mesh, files
from vlm_jax.config.validate import validate
from vlm_jax.hub.export import exportable
from vlm_jax.hub.inputs import argument_names
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import PARTS
from vlm_jax.testing import random_batch, random_params, tiny
from vlm_jax.train.step import init_sharded_state, jit_train_step


@pytest.fixture
def copy_of(monkeypatch):
    """`copy_of(kind)`: the tiny experiment with a copy of that style under the name `my_{kind}`."""

    def copy(kind: str):
        # Traced models are cached by their settings, so every copy has a name of its own.
        monkeypatch.setitem(FUSION_STYLES, f"my_{kind}", FUSION_STYLES[kind])
        return validate(tiny(f"my_{kind}"))

    return copy


@pytest.mark.parametrize("kind", FUSION_STYLES)
def test_a_copy_has_the_parts_and_the_checkpoints_of_the_original(copy_of, kind):
    cfg, original = copy_of(kind), tiny(kind)
    assert jax.tree.map(np.shape, abstract_params(cfg)) == jax.tree.map(
        np.shape, abstract_params(original)
    )
    assert argument_names(cfg) == argument_names(original)
    old, new = f"fusion.kind {kind} cannot", f"fusion.kind {cfg.fusion.kind} cannot"
    assert exportable(cfg) == exportable(original).replace(old, new)


def test_a_copy_trains_and_gives_the_logits_of_the_original(copy_of, forward):
    cfg, original = copy_of("hybrid"), tiny("hybrid")
    params, batch = random_params(original), random_batch(original)
    assert set(params) == set(PARTS[:3])
    np.testing.assert_array_equal(
        forward(cfg, params, batch).logits, forward(original, params, batch).logits
    )
    mesh = axes.make_mesh(Mesh())
    state = init_sharded_state(cfg, mesh, {})
    with jax.set_mesh(mesh):
        batch = sharding.place_rows(random_batch(cfg, rows=8), mesh)
        _, metrics = jit_train_step(cfg, mesh)(state, batch)
    assert np.isfinite(metrics["loss"])


def test_a_copy_is_a_choice_of_the_command_line_and_of_config_files(copy_of):
    cfg = copy_of("unified")
    assert files.override(tiny(), ["--fusion.kind", "my_unified"], "run.py") == cfg
    assert files.from_json(files.to_json(cfg), "config.json") == cfg


@pytest.mark.parametrize("kind", ["mine", ""])
def test_an_unknown_style_is_refused_with_the_known_ones(kind):
    known = ", ".join(FUSION_STYLES)
    cfg = replace(tiny(), fusion=Fusion(kind))
    with pytest.raises(
        ConfigError, match=f"fusion.kind '{kind}' is not a valid choice: choose {known}"
    ):
        validate(cfg)
    with pytest.raises(ConfigError, match=f"choose {known}"):
        files.from_json(files.to_json(cfg), "config.json")
    with pytest.raises(ConfigError, match=f"choose {known}"):
        files.override(tiny(), ["--fusion.kind", kind or "nothing"], "run.py")
