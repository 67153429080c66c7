"""Seconds of a training step without the custom gradients or with other settings of malloc.

    python experiments/benchmarks/step.py [--config configs/easy_vqa/unified.py ...]

Each variant is a separate process, because the allocator reads its setting at the start and a
jitted step keeps the functions it was traced with. All take the real optimizer step on the real
data. They are compiled first, then take turns. A variant's time is the median of its turns; its
ratio is the median over turns of its time to the time of the unchanged step.
"""

import argparse
import statistics
import sys
from pathlib import Path

import report
import turns
from report import Result

sys.path.insert(0, str(Path(__file__).parents[2]))

from vlm_jax.runtime.process import ALLOCATOR

CONFIG = "configs/easy_vqa/unified.py"
AS_IT_IS = "as it is"


def plain_products():
    """Use XLA's own gradient of products."""
    from vlm_jax.nn import layers

    layers.matmul = lambda x, w: x @ w


def plain_attention():
    """Use XLA's own gradient of attention."""
    from vlm_jax.nn import attention

    forward = attention._attention_forward
    attention._attention = lambda *inputs: forward(*inputs)[0]


# Name -> functions called before the model is traced.
VARIANTS = {
    AS_IT_IS: [],
    "plain gradient of products": [plain_products],
    "plain gradient of attention": [plain_attention],
    "both plain": [plain_products, plain_attention],
    "small pages": [],
    "memory returned": [],
}
# Variant -> settings of malloc other than `ALLOCATOR`.
ALLOCATORS = {
    "small pages": ALLOCATOR.replace("hugetlb=1", "hugetlb=0"),
    "memory returned": "glibc.malloc.hugetlb=1",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", nargs="+", default=[CONFIG])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="minimum of each turn")
    report.add_option(parser)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.config[0], arguments.serve)
        return
    variants = [AS_IT_IS] + [name for name in arguments.variants if name != AS_IT_IS]
    results = []
    for config in arguments.config:
        times = measure(config, variants, arguments.turns, arguments.seconds)
        print(f"{config:<40}{'seconds a step':>16}")
        for name in variants:
            print(f"{name:<40}{statistics.median(times[name]):>16.4f}", flush=True)
        for name in variants[1:]:
            ratios = [time / base for time, base in zip(times[name], times[AS_IT_IS])]
            title = f"step of {Path(config).stem}, {name}"
            results.append(Result.of(title, "times the step's time", ratios))
    report.write(results, arguments.json)


def measure(config: str, variants: list[str], count: int, seconds: float) -> dict[str, list[float]]:
    """Returns seconds of a step of each variant, turn by turn."""
    servers = {}
    for name in variants:
        settings = {"GLIBC_TUNABLES": ALLOCATORS.get(name, ALLOCATOR)}
        servers[name] = turns.Server("--config", config, "--serve", name, env=settings)
    answers = turns.take_turns(servers, count, seconds)
    return {
        name: [answer["seconds"] for answer in variant_answers]
        for name, variant_answers in answers.items()
    }


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
