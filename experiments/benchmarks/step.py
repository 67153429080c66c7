"""What the custom gradients and the huge pages buy: seconds of a training step, with each of them taken away.

    python experiments/benchmarks/step.py [--config configs/easy_vqa/unified.py ...]

Each variant is a process of its own, because the allocator reads its setting when a process begins and a jitted step
keeps what it was traced with. All take the real optimizer step on the real data. They are started and compiled first;
then they take turns, one at a time, so that a machine that slows down slows all of them. A variant's time is the median
of its turns, its ratio the median over the turns of its time to that of the step as it is, in the same turn.
"""

import argparse
import statistics
import sys
from pathlib import Path

import turns

sys.path.insert(0, str(Path(__file__).parents[2]))

CONFIG = "configs/easy_vqa/unified.py"
AS_IT_IS = "as it is"


def plain_products():
    """Products as XLA differentiates them."""
    from vlm_jax.nn import layers

    layers.matmul = lambda x, w: x @ w


def plain_attention():
    """Attention as XLA differentiates it."""
    from vlm_jax.nn import attention

    forward = attention._attention_forward
    attention._attention = lambda *inputs: forward(*inputs)[0]


VARIANTS = {  # name: what is done before the model is traced
    AS_IT_IS: [],
    "plain gradient of products": [plain_products],
    "plain gradient of attention": [plain_attention],
    "both plain": [plain_products, plain_attention],
    "small pages": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", nargs="+", default=[CONFIG])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of every turn, at least")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.config[0], arguments.serve)
        return
    variants = [AS_IT_IS] + [name for name in arguments.variants if name != AS_IT_IS]
    for config in arguments.config:
        times = measure(config, variants, arguments.turns, arguments.seconds)
        print(f"{config:<40}{'seconds a step':>16}{'ratio':>8}{'lowest':>8}{'highest':>9}")
        for name in variants:
            ratios = [time / base for time, base in zip(times[name], times[AS_IT_IS])]
            middle, ratio = statistics.median(times[name]), statistics.median(ratios)
            print(
                f"{name:<40}{middle:>16.4f}{ratio:>8.2f}{min(ratios):>8.2f}{max(ratios):>9.2f}",
                flush=True,
            )


def measure(config: str, variants: list[str], count: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a step of each variant, turn by turn."""
    servers = {}
    for name in variants:
        pages = {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(name != 'small pages')}"}
        servers[name] = turns.Server("--config", config, "--serve", name, env=pages)
    answers = turns.take_turns(servers, count, seconds)
    return {name: [answer["seconds"] for answer in found] for name, found in answers.items()}


def serve(config: str, variant: str) -> None:
    for change in VARIANTS[variant]:
        change()
    import jax
    from packing import Side

    from vlm_jax.config import files
    from vlm_jax.data import pipeline

    cfg = files.load(config)
    side = Side(cfg, pipeline.train_tokenizer(cfg))
    with jax.set_mesh(side.mesh):
        turns.serve({}, lambda seconds: turns.times(side.take_step, seconds))


if __name__ == "__main__":
    main()
