"""A training step on a mixture: the sums of its sources, which make up the loss."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.train.steps import ONE, mesh_of, random_state
from vlm_jax.config import Source, Train
from vlm_jax.data import pipeline
from vlm_jax.structs import PADDING
from vlm_jax.testing import tiny, write_conversations
from vlm_jax.train.step import jit_train_step

TEMPLATES = ("plain", "vicuna", "caption")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Two microbatches of four rows, of three sources; the last is never in the first batch."""
    data = write_conversations(tmp_path_factory.mktemp("talks"), count=24)
    weights = (3.0, 2.0, 1e-5)
    sources = [Source(name, weight, template=name) for name, weight in zip(TEMPLATES, weights)]
    cfg = tiny(
        data=replace(data, mixture=tuple(sources)), train=Train(batch_size=8, microbatches=2)
    )
    return replace(cfg, decoder=replace(cfg.decoder, max_positions=128))


def test_the_sums_of_the_sources_make_up_the_loss(cfg):
    batch = next(pipeline.training_iterator(cfg, pipeline.train_tokenizer(cfg)))
    mesh = mesh_of(ONE)
    with jax.set_mesh(mesh):
        _, metrics = jit_train_step(cfg, mesh)(random_state(cfg, mesh), batch)
    nats, scored, tokens = jax.device_get(metrics["sources"])
    np.testing.assert_allclose(nats.sum() / scored.sum(), metrics["loss"], rtol=1e-5)
    for source in range(3):
        is_own = batch.source_ids == source
        assert scored[source] == batch.loss_weights[is_own].sum()
        assert tokens[source] == np.sum(batch.segment_ids[is_own] != PADDING)
    assert (scored[:2] > 0).all()
    assert (nats[2], scored[2]) == (0, 0)
