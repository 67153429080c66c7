"""Runs that take seconds."""

from dataclasses import replace

import pytest

from vlm_jax.config import (
    Data,
    Experiment,
    Optim,
    Train,
)
from vlm_jax.testing import on_easy_vqa, variants_and_tiles
from vlm_jax.train import loop


@pytest.fixture(scope="session")
def short_run(datasets_dir):
    """`short_run(name, workdir, **train)`: a new tiny experiment on 40 images of easy-VQA."""

    def make(name="unified", workdir="", **train) -> Experiment:
        cfg = on_easy_vqa(variants_and_tiles()[name])
        return replace(
            cfg,
            data=replace(cfg.data, dir=datasets_dir, augment=Data().augment),
            train=Train(batch_size=8, log_every_steps=1, **train),
            optim=Optim(warmup_steps=2),
            eval=replace(cfg.eval, max_examples=8),
            workdir=str(workdir),
        )

    return make


@pytest.fixture(scope="session", autouse=True)
def compile_steps_once():
    """Compiles the step of equal runs once: that is most of the time of a short run."""
    compile_step, programs = loop.compile_train_step, {}

    def compile_once(cfg, mesh, state, batch):
        train = replace(cfg.train, checkpoint_every_steps=1, log_every_steps=1)
        key = replace(cfg, workdir="", train=train), mesh
        if key not in programs:
            programs[key] = compile_step(cfg, mesh, state, batch)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_train_step", compile_once)
        yield
