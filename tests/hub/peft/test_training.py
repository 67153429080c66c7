"""Training continues an adapter as PEFT does in torch: the same losses, step by step."""

import functools
from dataclasses import replace

import jax
import numpy as np
import torch
from flax import traverse_util
from transformers import LlamaConfig, LlamaForCausalLM

from tests.hub.parity import SMALL, saved
from tests.hub.peft.test_adapter import wrap
from tests.hub.peft.test_start import begin
from vlm_jax import axes
from vlm_jax.config import Mesh, Optim
from vlm_jax.nn.vlm import example_batch
from vlm_jax.structs import State
from vlm_jax.train import optim
from vlm_jax.train.initial import load_parts
from vlm_jax.train.step import abstract_state, train_step

STEPS = 20
OPTIM = Optim(learning_rate=0.01, warmup_steps=3, weight_decay=0.01)
IDS = np.random.default_rng(0).integers(1, 64, (4, 13))


def torch_losses(model, cfg) -> list[float]:
    """Losses of PEFT's model, trained by torch's AdamW with our learning rates."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"betas": (OPTIM.beta1, OPTIM.beta2), "weight_decay": OPTIM.weight_decay}
    optimizer = torch.optim.AdamW(trained, **settings)
    rate = optim.schedule(OPTIM, cfg.train.steps)
    losses = []
    ids = torch.tensor(IDS)
    for step in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        optimizer.step()
        losses.append(loss.item())
    return losses


def own_losses(cfg) -> list[float]:
    mesh = axes.make_mesh(Mesh())
    params = load_parts(cfg, abstract_state(cfg, mesh), mesh)
    params = traverse_util.unflatten_dict(params, sep="/")
    trained, _ = optim.split(params, cfg.optim)
    state = State(jax.numpy.int32(0), params, optim.optimizer(cfg).init(trained))
    step = jax.jit(functools.partial(train_step, cfg))
    ids, losses = IDS.astype(np.int32), []
    batch = example_batch(cfg.model, length=ids.shape[1] - 1, rows=len(ids))
    positions = np.broadcast_to(np.arange(ids.shape[1] - 1, dtype=np.int32), batch.tokens.shape)
    batch = batch.replace(tokens=ids[:, :-1], targets=ids[:, 1:], positions=positions)
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def test_losses_are_those_of_peft_in_torch(tmp_path):
    model = saved(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path / "base")
    settings = {"target_modules": ["q_proj", "o_proj", "down_proj"], "init_lora_weights": True}
    wrapped = wrap(model, tmp_path / "adapter", alpha_pattern={"q_proj": 12}, **settings)
    cfg = begin(tmp_path / "base", tmp_path / "adapter", optim=OPTIM)
    cfg = replace(cfg, train=replace(cfg.train, steps=STEPS))
    expected = torch_losses(wrapped, cfg)
    assert abs(expected[-1] - expected[0]) > 0.1
    np.testing.assert_allclose(own_losses(cfg), expected, atol=1e-4)
