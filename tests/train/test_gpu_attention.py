"""A training step for a GPU, which need not be there, has a mask in memory only if it needs one."""

import re
from dataclasses import replace

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from vlm_jax import axes, testing
from vlm_jax.config import Experiment, Mesh
from vlm_jax.plan.memory import batch_shapes
from vlm_jax.train.step import abstract_state, jit_train_step

WINDOW = 64
SLIDING = {"sliding_window": WINDOW, "sliding_layers": (0,)}


def experiment(kind: str = "unified", is_packed: bool = False, **decoder) -> Experiment:
    cfg = testing.tiny(kind)
    stack = {"width": 64, "heads": 1, "head_dim": 64}
    decoder = stack | {"kv_heads": 1, "vocab_size": 128, "max_positions": 512} | decoder
    conversations = {"source": "conversations", "files": ("a.json",)} if is_packed else {}
    return replace(
        cfg,
        data=replace(cfg.data, questions_per_row=1, text_length=300, **conversations),
        vision=replace(cfg.vision, **stack),
        decoder=replace(cfg.decoder, **decoder),
        train=replace(cfg.train, batch_size=2, compute_dtype="bfloat16"),
    )


CUDNN = {"fmhaSoftmax", "fmhaSoftmaxBackward"}
WITH_MASK = {"fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"}
TRITON = {"xla.gpu.triton"}
CASES = {  # kernels, cuDNN's own masks, lengths of its windows (0: none)
    "rows": (experiment(), CUDNN, {"NO_MASK", "CAUSAL"}, {0}),
    "packed rows": (experiment(is_packed=True), CUDNN | TRITON, {"NO_MASK"}, {0}),
    "memory of another length, sliding layers": (
        experiment("cross_attention", **SLIDING),
        CUDNN,
        {"NO_MASK", "CAUSAL"},
        {0, WINDOW},
    ),
    "packed rows, sliding layers": (
        experiment(is_packed=True, **SLIDING),
        CUDNN | WITH_MASK,
        {"NO_MASK"},
        {0},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_a_mask_in_memory_only_if_nothing_else_states_it(name, monkeypatch):
    cfg, kernels, masks, windows = CASES[name]
    # As on a machine with cuDNN 9.19.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(axes, "platform", lambda: "gpu")
    text = lowered_for_cuda(cfg)
    assert set(re.findall(r"@(?:__cudnn|__gpu)\$([\w.]+)", text)) == kernels
    assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == masks
    assert set(map(int, re.findall(r"sliding_window_length\\22: (\d+)", text))) == windows
    length = cfg.row_length
    squares = re.findall(rf"tensor<[\dx]*{length}x{length}x\w+>", text)
    assert bool(squares) == (kernels >= WITH_MASK)


def lowered_for_cuda(cfg: Experiment) -> str:
    """StableHLO of the step, forward and backward."""
    mesh = axes.make_mesh(Mesh(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = jit_train_step(cfg, mesh).trace(abstract_state(cfg, mesh), batch_shapes(cfg))
        return step.lower(lowering_platforms=("cuda",)).as_text()
