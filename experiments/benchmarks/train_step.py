"""A training step of the 39 M models, ours against transformers: seconds, share of the machine's
peak, memory.

    python experiments/benchmarks/train_step.py [--model llava mllama] [--turns 7]

Float32, batch 8, one image of 196 tokens and 64 text tokens a row, AdamW with clipping by the
global norm, the same weights, inputs and rates; transformers with scaled-dot-product attention
and torch's fused AdamW. The losses of the first steps are printed side by side and have to agree.
The peak is the best of a few products of 2048 x 2048 matrices, measured by each side in its own
turns; the share counts what torch's operators compute (`FlopCounterMode`), for both sides alike.
Below it stands that of ours by `vlm_jax/cost/flops.py`: without the head where nothing is scored,
with attention, which torch's counter leaves out on a CPU. In the backward pass ours computes all
but attention and the products with weights again (`remat` "attention", in loops that are not laid
out): that takes less time than keeping it does. Both have glibc's huge pages, as `run.py` has.
"""

import argparse
import math
from dataclasses import replace

import probe
import turns

from vlm_jax.runtime.process import prepare_process

STEPS, COMPARED = 10_000, 8  # of the schedule; whose losses are compared
RATE, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.99), 1e-4, 1.0


def ours(kind: str, folder: str):
    """A function that takes a step and returns its loss, and one that counts the FLOPs of a step."""
    import jax

    from vlm_jax import axes, sharding
    from vlm_jax.config import Mesh, Optim, Train
    from vlm_jax.cost.flops import train_flops
    from vlm_jax.structs import State
    from vlm_jax.train import optim as optimizers
    from vlm_jax.train.step import compile_train_step, state_shardings

    optim = Optim(
        "adamw",
        RATE,
        warmup_steps=1,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=DECAY,
        clip_norm=CLIP,
    )
    train = Train(steps=STEPS, batch_size=probe.ROWS)
    model = probe.Ours.load(folder, unroll=1, remat="attention", optim=optim, train=train)
    cfg, mesh, batch = model.cfg, axes.make_mesh(Mesh()), model.batch(probe.inputs(kind))
    with jax.set_mesh(mesh):
        trained, _ = optimizers.split(model.params, cfg.optim)
        init = optimizers.optimizer(cfg).init
        state = State(jax.numpy.int32(0), model.params, jax.jit(init)(trained))
        held = {"state": jax.device_put(state, state_shardings(cfg, mesh))}
        del state, trained, model
        batch = jax.device_put(batch, sharding.row_sharding(mesh))
        step = compile_train_step(cfg, mesh, held["state"], batch)

    def take() -> float:
        with jax.set_mesh(mesh):
            held["state"], metrics = step(held["state"], batch)
            return float(metrics["loss"])

    return take, lambda: train_flops(
        replace(cfg, data=replace(cfg.data, text_length=probe.TEXT_TOKENS))
    )


def theirs(kind: str, folder: str):
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    arrays = probe.inputs(kind)
    batch = {name: torch.tensor(array) for name, array in arrays.items()}
    batch["labels"] = torch.tensor(probe.labels(arrays))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE, BETAS, fused=True)

    def rate(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1))) if step else 0.0

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def take() -> float:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return float(loss.detach())

    return take, lambda: counted(take)


def jax_product():
    import jax

    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: x @ x)
    return lambda: product(x).block_until_ready()


def torch_product():
    import torch

    x = torch.randn(2048, 2048)
    return lambda: x @ x


SIDES = {"vlm_jax": (ours, jax_product), "transformers": (theirs, torch_product)}


def serve(side: str, kind: str, folder: str) -> None:
    make_step, make_product = SIDES[side]
    (step, count), product = make_step(kind, folder), make_product()
    first = {"losses": [step() for _ in range(COMPARED)], "flops": count()}

    def answer(seconds: float) -> dict:
        found = turns.times(step, seconds) | {"peak_bytes": turns.peak_bytes(step)}
        return found | {"peak_flops": 2 * 2048**3 / turns.times(product, 0.5)["best_seconds"]}

    turns.serve(first, answer)


def counted(step) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compare(kind: str, given: argparse.Namespace) -> None:
    first, answers = turns.with_one_model(probe.torch_model(kind), given, "--model", kind)
    losses = {side: said["losses"] for side, said in zip(answers, first)}
    own, flops = (said["flops"] for said in first)
    mine, other = answers.values()
    for side, found in losses.items():
        print(f"{kind}: losses of the first steps, {side:<13}", *(f"{loss:.5f}" for loss in found))
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(*losses.values())):
        raise SystemExit("the losses do not agree")
    peak = max(answer["peak_flops"] for answer in mine + other)
    print(
        f"{kind}: {flops / 1e9:.0f} GFLOP a step; the best matrix product reached {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{kind:<16}{'seconds':>9}{'fastest':>9}{'of peak':>9}{'fastest':>9}{'peak GB':>9}")
    for side, found in answers.items():
        middle, best = turns.middle(found, "seconds"), turns.best(found)
        shares = f"{flops / middle / peak:>9.2f}{flops / best / peak:>9.2f}"
        print(
            f"{side:<16}{middle:>9.2f}{best:>9.2f}{shares}{turns.middle(found, 'peak_bytes') / 1e9:>9.2f}"
        )
    print(
        f"{'of peak, by FLOPs of ours':<28}{own / turns.middle(mine, 'seconds') / peak:.2f} ({own / 1e9:.0f} GFLOP)"
    )
    print(f"{'speed, ours over theirs':<28}{turns.speed(mine, other)}")
    memory = turns.middle(mine, "peak_bytes") / turns.middle(other, "peak_bytes")
    print(f"{'memory, ours over theirs':<28}{memory:.2f}", flush=True)


def main() -> None:
    parser = turns.parser(__doc__, seconds=4.0)
    parser.add_argument("--model", nargs="+", choices=probe.KINDS, default=probe.KINDS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.model[0], given.folder)
        return
    for kind in given.model:
        compare(kind, given)


if __name__ == "__main__":
    prepare_process()
    main()
