"""Training step of the 39 M models, ours against transformers: seconds, share of peak, memory.

    python experiments/benchmarks/train_step.py [--model llava mllama] [--big_vision DIR]

Float32, batch 8, one image of 196 tokens and 64 text tokens a row, AdamW with clipping by the
global norm, the same weights, inputs and rates; transformers with scaled-dot-product attention
and torch's fused AdamW. The losses of the first steps are printed side by side and must agree.
The peak is the best of a few products of 2048 x 2048 matrices, measured by each side in its own
turns; the share counts the FLOPs of torch's operators (`FlopCounterMode`) for both sides. The next
line has our share by `vlm_jax/cost/flops.py`: without the head for unscored tokens, and with
attention, which torch's counter omits on a CPU. Our backward pass recomputes all but attention and
matmuls with weights (`remat` "attention", layers not unrolled), which is faster than storing them.
Both have the settings of malloc that `run.py` has.

With `--big_vision DIR`, a checkout of https://github.com/google-research/big_vision, its PaliGemma
takes turns, too: the LLaVA-like sizes with its own model, loss, clipping and AdamW (`scale_by_adam`
with decoupled weight decay), jitted with donated state (`big_vision_step.py`). Its layers are
unrolled or scanned, whichever takes the fastest of the first steps. The weights are random, so that
its loss must fall but equals no other. `pip install einops ml_collections tensorflow-cpu` is needed
in this environment; its memory includes TensorFlow, which it imports.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import big_vision_step
import probe
import report
import turns
from report import Result

from vlm_jax.runtime.process import prepare_process

# Steps of the schedule, and steps whose losses are compared.
STEPS, COMPARED = 10_000, 8
NAMES = {"llava": "LLaVA-like", "mllama": "Llama-3.2-Vision-like"}
RATE, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.99), 1e-4, 1.0


def load(folder: str):
    """Returns our model of a checkpoint, with the settings of this benchmark."""
    from vlm_jax.config import Optim, Train

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
    return probe.Ours.load(folder, unroll=1, remat="attention", optim=optim, train=train)


def ours(options: argparse.Namespace):
    """Returns a function that takes a step and returns its loss, and one that describes it."""
    import jax

    from vlm_jax.cost.flops import train_flops

    model = load(options.folder)
    cfg = replace(model.cfg, data=replace(model.cfg.data, text_length=probe.TEXT_TOKENS))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    take = own_step(model, options.model[0])
    return take, lambda: {"flops": train_flops(cfg), "parameters": parameters}


def own_step(model: probe.Ours, kind: str):
    """Returns a function that takes a step and returns its loss."""
    import jax

    from vlm_jax import axes, sharding
    from vlm_jax.config import Mesh
    from vlm_jax.structs import State
    from vlm_jax.train import optim as optimizers
    from vlm_jax.train.step import compile_train_step, state_shardings

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

    return take


def theirs(options: argparse.Namespace):
    model = torch_model(options.folder)
    take = torch_step(model, options.model[0])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return take, lambda: {"flops": counted(take), "parameters": parameters}


def big_vision(options: argparse.Namespace):
    optim = {
        "optax_name": "scale_by_adam",
        "optax": {"b1": BETAS[0], "b2": BETAS[1]},
        "lr": RATE,
        # Not scaled by the rate, but by its schedule.
        "wd": RATE * DECAY,
        "wd_mults": [(".*(kernel|/w|einsum|linear|embedding)$", 1.0)],
        "grad_clip_norm": CLIP,
        "schedule": {"decay_type": "cosine", "warmup_steps": 1},
        "total_steps": STEPS,
    }
    take = big_vision_step.Step(options.big_vision, options.layers, optim)
    return take, lambda: turns.times(take, 0, at_least=3) | {"parameters": take.parameters}


def torch_model(folder: str):
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


def torch_step(model, kind: str):
    """Returns a function that takes a step of torch's model and returns its loss."""
    import torch

    model.train()
    arrays = probe.inputs(kind)
    batch = {name: torch.tensor(array) for name, array in arrays.items()}
    batch["labels"] = torch.tensor(probe.labels(arrays))
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE, BETAS, fused=True)

    def rate(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1))) if step else 0.0

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def take() -> float:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return float(loss.detach())

    return take


def jax_product():
    import jax

    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: x @ x)
    return lambda: product(x).block_until_ready()


def torch_product():
    import torch

    x = torch.randn(2048, 2048)
    return lambda: x @ x


SIDES = {
    "vlm_jax": (ours, jax_product),
    "transformers": (theirs, torch_product),
    "big_vision": (big_vision, jax_product),
}


def serve(options: argparse.Namespace) -> None:
    make_step, make_product = SIDES[options.serve]
    (step, describe), product = make_step(options), make_product()
    first = {"losses": [step() for _ in range(COMPARED)]} | describe()

    def answer(seconds: float) -> dict:
        costs = turns.times(step, seconds) | {"peak_bytes": turns.peak_bytes(step)}
        return costs | {"peak_flops": 2 * 2048**3 / turns.times(product, 0.5)["best_seconds"]}

    turns.serve(first, answer)


def counted(step) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compare(kind: str, options: argparse.Namespace) -> list[Result]:
    peers = {}
    if options.big_vision is not None and kind == "llava":
        peers["big_vision"] = big_vision_step.fastest_server(options.big_vision)
    first, answers = turns.with_one_model(
        probe.torch_model(kind), options, "--model", kind, peers=peers
    )
    first = dict(zip(turns.SIDES, first, strict=True))
    first |= {side: server.first for side, server in peers.items()}
    for side, answer in first.items():
        numbers = [f"{loss:.5f}" for loss in answer["losses"]]
        print(f"{kind}: losses of the first steps, {side:<13}", *numbers)
    check_losses(*(first[side]["losses"] for side in turns.SIDES))
    for side in peers:
        check_peer(first["vlm_jax"], side, first[side])
    own, flops = first["vlm_jax"]["flops"], first["transformers"]["flops"]
    mine, other = answers["vlm_jax"], answers["transformers"]
    peak = max(answer["peak_flops"] for answer in mine + other)
    print(f"{kind}: {flops / 1e9:.0f} GFLOP a step; peak of a matmul {peak / 1e9:.0f} GFLOP/s")
    print(
        f"{kind:<16}{'seconds':>9}{'fastest':>9}{'of peak':>9}{'fastest':>9}{'peak GB':>9}"
        f"{'parameters':>13}"
    )
    for side, side_answers in answers.items():
        middle, best = turns.middle(side_answers, "seconds"), turns.best(side_answers)
        peak_gb = turns.middle(side_answers, "peak_bytes") / 1e9
        shares = f"{flops / middle / peak:>9.2f}{flops / best / peak:>9.2f}"
        if side in peers:
            # Another model, which torch did not count.
            shares = f"{'-':>9}{'-':>9}"
        parameters = first[side]["parameters"]
        print(f"{side:<16}{middle:>9.2f}{best:>9.2f}{shares}{peak_gb:>9.2f}{parameters:>13,}")
    name = f"training step, {NAMES[kind]}"
    memory = [a["peak_bytes"] / b["peak_bytes"] for a, b in zip(mine, other, strict=True)]
    shares = [own / answer["seconds"] / peak for answer in mine]
    results = [
        turns.speed(name, mine, other),
        Result.of(f"{name}: peak memory", "times transformers'", memory),
        Result.of(f"{name}: own FLOPs", "of the peak", shares, own / turns.best(mine) / peak),
    ]
    for side in peers:
        results.append(turns.speed(name, mine, answers[side], f"times {side}'s speed"))
    return results


def check_peer(mine: dict, side: str, peer: dict) -> None:
    """Ends the program unless a peer with other weights learns, and is as large as our model."""
    if not peer["losses"][-1] < peer["losses"][0]:
        raise SystemExit(f"the loss of {side} does not fall")
    if not math.isclose(mine["parameters"], peer["parameters"], rel_tol=0.02):
        raise SystemExit(
            f"{side} has {peer['parameters']:,} parameters, and ours {mine['parameters']:,}"
        )


def check_losses(mine: list[float], others: list[float]) -> None:
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(mine, others, strict=True)):
        raise SystemExit("the losses do not agree")


def main() -> None:
    parser = turns.parser(__doc__, seconds=4.0, sides=SIDES)
    parser.add_argument("--model", nargs="+", choices=probe.KINDS, default=probe.KINDS)
    parser.add_argument(
        "--big_vision", type=Path, metavar="DIR", help="a checkout of big_vision, another side"
    )
    parser.add_argument("--layers", choices=big_vision_step.LAYERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    if options.big_vision is not None:
        big_vision_step.check(options.big_vision)
    results = [result for kind in options.model for result in compare(kind, options)]
    report.write(results, options.json)


if __name__ == "__main__":
    prepare_process()
    main()
