"""A number that is not finite stops the run before it is saved, and what spoilt it is named."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util

from vlm_jax import axes
from vlm_jax.config import NonFiniteError, Optim
from vlm_jax.data import pipeline
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.testing import random_batch, random_params, tiny
from vlm_jax.train import loop
from vlm_jax.train.not_finite import first_nonfinite_parameter
from vlm_jax.train.step import init_state, train_step

pytestmark = pytest.mark.usefixtures("one_device")

step = jax.jit(train_step, static_argnums=0)


@pytest.fixture
def cfg(short_run, tmp_path):
    return short_run(workdir=tmp_path / "run", steps=6, checkpoint_every_steps=2)


@pytest.mark.parametrize("field", ["loss", "grad_norm"])
@pytest.mark.parametrize("bad_step", [3, 4])  # between two checkpoints, and where one is due
def test_a_number_that_is_not_finite_stops_the_run_before_it_is_saved(
    cfg, monkeypatch, field, bad_step
):
    def compile_train_step(cfg, mesh, state, batch):
        def step(state, batch):  # what the loop sees of a step, without its arithmetic
            state = state.replace(step=state.step + 1)
            metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0}
            metrics |= {
                "finite": {"decoder/norm/scale": False},
                "largest": {"decoder/norm/scale": 1.0},
            }
            return state, metrics | ({field: float("nan")} if int(state.step) == bad_step else {})

        return step

    monkeypatch.setattr(loop, "compile_train_step", compile_train_step)
    with pytest.raises(NonFiniteError, match=f"step {bad_step}: the {field} is nan"):
        loop.train(cfg)
    workdir = Workdir(cfg.workdir)
    assert [path.name for path in workdir.checkpoints.iterdir()] == ["2"]
    rows = map(json.loads, workdir.metrics.read_text().splitlines())
    assert [row["step"] for row in rows] == list(range(1, bad_step))


def test_what_is_not_finite_is_named_with_the_images_of_its_batch(cfg):
    cfg = replace(cfg, optim=Optim(learning_rate=1e38, warmup_steps=0))
    with pytest.raises(NonFiniteError) as error:
        loop.train(cfg)
    assert not list(Workdir(cfg.workdir).checkpoints.iterdir())
    message = str(error.value)
    assert message.startswith(
        "step 2: the loss is nan; all parameters are finite and no gradient is; "
        "the largest value is "
    )
    ids = pipeline.batch_ids(cfg, None, {"next_index": 1})
    assert message.endswith(f"The batch held the images {', '.join(map(str, ids))}.")


PLANTED = {
    "vision": "vision/patch_embed/positions",
    "projector": "projector/linear/kernel",
    "decoder": "decoder/final_norm/scale",
    "cross_attention": "decoder/blocks/layers/block_0/cross/value/kernel",
}


@pytest.mark.parametrize("part", PLANTED)
def test_a_parameter_that_is_not_finite_is_named_and_no_other(part):
    cfg = tiny("cross_attention")
    with jax.set_mesh(axes.make_mesh(cfg.mesh)):
        params = traverse_util.flatten_dict(random_params(cfg), sep="/")
        params[PLANTED[part]] = params[PLANTED[part]] * np.nan
        state = init_state(cfg, jax.random.key(0)).replace(
            params=traverse_util.unflatten_dict(params, sep="/")
        )
        _, metrics = step(cfg, state, random_batch(cfg))
    message = first_nonfinite_parameter(
        jax.device_get(metrics["finite"]), jax.device_get(metrics["largest"])
    )
    assert message == (
        f"first non-finite parameter: {PLANTED[part]} of {part} (1 of {len(params)} parameters)"
    )


def test_a_gradient_is_spoilt_from_where_the_backward_pass_comes():
    paths = [
        "vision/patch_embed/kernel",
        "projector/linear/kernel",
        "decoder/embedding/table",
        "decoder/final_norm/scale",
    ]
    sizes = dict.fromkeys(paths, 1.0)
    message = first_nonfinite_parameter(dict(zip(paths, (False, False, True, True))), sizes)
    assert message == (
        "first non-finite gradient in the backward pass: projector/linear/kernel of projector "
        "(2 of 4 gradients)"
    )
    message = first_nonfinite_parameter(
        dict.fromkeys(paths, False), sizes | {"projector/linear/kernel": 1e30}
    )
    assert message.endswith(
        "no gradient is; the largest value is 1e+30, of projector/linear/kernel of projector"
    )
