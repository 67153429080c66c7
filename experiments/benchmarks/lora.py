"""LoRA step of the 39 M LLaVA-like model, against the full step and against PEFT in torch.

    python experiments/benchmarks/lora.py [--turns 7]

Model, inputs, rates and the two sides are as in `train_step.py`. Adapters of rank 16 are in all
linear layers of the decoder; everything else is frozen. Ours begins with the adapter that PEFT
wrote, so that the losses of the first steps, which are printed side by side, must agree. The full
step, which trains all parameters, takes turns with both.
"""

import argparse
import tempfile
from dataclasses import replace

import probe
import report
import train_step
import turns
from report import Result

from vlm_jax.runtime.process import prepare_process

KIND = "llava"
RANK, ALPHA = 16, 32
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BASE, ADAPTER = "base", "adapter"


def write_models(folder: str) -> None:
    """Writes the base model and a new adapter of it."""
    import peft

    model = probe.torch_model(KIND)
    model.save_pretrained(f"{folder}/{BASE}")
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    peft.get_peft_model(model, settings).save_pretrained(f"{folder}/{ADAPTER}")


def lora(folder: str):
    """Returns a function that takes a step of our adapters and returns its loss."""
    from flax import traverse_util

    from vlm_jax import axes
    from vlm_jax.config import LrMult, Mesh
    from vlm_jax.hub.peft.start import with_adapter_settings
    from vlm_jax.train.initial import load_parts
    from vlm_jax.train.step import abstract_state

    base = f"{folder}/{BASE}"
    model = train_step.load(base)
    cfg = replace(model.cfg, init_from=base, adapter=f"{folder}/{ADAPTER}")
    for part in ("vision", "projector", "decoder"):
        cfg = replace(cfg, **{part: replace(getattr(cfg, part), checkpoint=base)})
    optim = replace(cfg.optim, lr_mult=LrMult(vision=0, projector=0))
    cfg = with_adapter_settings(replace(cfg, optim=optim))
    mesh = axes.make_mesh(Mesh())
    params = load_parts(cfg, abstract_state(cfg, mesh), mesh)
    params = traverse_util.unflatten_dict(params, sep="/")
    return train_step.own_step(replace(model, cfg=cfg, params=params), KIND)


def full(folder: str):
    return train_step.own_step(train_step.load(f"{folder}/{BASE}"), KIND)


def with_peft(folder: str):
    import peft

    model = train_step.torch_model(f"{folder}/{BASE}")
    model = peft.PeftModel.from_pretrained(model, f"{folder}/{ADAPTER}", is_trainable=True)
    return train_step.torch_step(model, KIND)


SIDES = {"LoRA": lora, "full": full, "PEFT": with_peft}


def serve(side: str, folder: str) -> None:
    step = SIDES[side](folder)
    first = {"losses": [step() for _ in range(train_step.COMPARED)]}
    turns.serve(
        first,
        lambda seconds: turns.times(step, seconds) | {"peak_bytes": turns.peak_bytes(step)},
    )


def compare(options: argparse.Namespace) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        write_models(folder)
        servers = {side: turns.Server("--serve", side, "--folder", folder) for side in SIDES}
        losses = {side: server.first["losses"] for side, server in servers.items()}
        answers = turns.take_turns(servers, options.turns, options.seconds)
    for side, side_losses in losses.items():
        numbers = [f"{loss:.5f}" for loss in side_losses]
        print(f"losses of the first steps, {side:<5}", *numbers)
    train_step.check_losses(losses["LoRA"], losses["PEFT"])
    print(f"{'':<16}{'seconds':>9}{'fastest':>9}{'peak GB':>9}")
    for side, side_answers in answers.items():
        seconds, fastest = turns.middle(side_answers, "seconds"), turns.best(side_answers)
        peak_gb = turns.middle(side_answers, "peak_bytes") / 1e9
        print(f"{side:<16}{seconds:>9.2f}{fastest:>9.2f}{peak_gb:>9.2f}")
    mine, whole, other = answers.values()
    times = [a["seconds"] / b["seconds"] for a, b in zip(mine, whole, strict=True)]
    fastest = turns.best(mine) / turns.best(whole)
    return [
        turns.speed("LoRA step", mine, other, "times PEFT's speed"),
        Result.of("LoRA step: peak memory", "times PEFT's", memory_ratios(mine, other)),
        Result.of("LoRA step: seconds", "times the full step's", times, fastest),
        Result.of("LoRA step: peak memory", "times the full step's", memory_ratios(mine, whole)),
    ]


def memory_ratios(mine: list[dict], others: list[dict]) -> list[float]:
    return [a["peak_bytes"] / b["peak_bytes"] for a, b in zip(mine, others, strict=True)]


def main() -> None:
    options = turns.parser(__doc__, seconds=4.0, sides=SIDES).parse_args()
    if options.serve:
        serve(options.serve, options.folder)
        return
    report.write(compare(options), options.json)


if __name__ == "__main__":
    prepare_process()
    main()
