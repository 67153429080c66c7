"""What the custom gradients and the huge pages buy: seconds of a training step, with each of them taken away.

    python experiments/benchmarks/step.py [--config configs/easy_vqa_unified.py ...]

Each variant is a process of its own, because the allocator reads its setting when a process begins and a jitted step
keeps what it was traced with. All take the real optimizer step on the real data. They are started and compiled first;
then they take turns, one at a time, so that a machine that slows down slows all of them. A variant's time is the median
of its turns, its ratio the median over the turns of its time to that of the step as it is, in the same turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

CONFIG = "configs/easy_vqa_unified.py"
AS_IT_IS = "as it is"


def plain_products():
    """Products as XLA differentiates them."""
    from vlm_jax.nn import layers

    layers.matmul = lambda x, w: x @ w


def plain_attention():
    """Attention as XLA differentiates it."""
    from vlm_jax.nn import attention

    forward = attention._attend_forward
    attention._attend = lambda *inputs: forward(*inputs)[0]


VARIANTS = {  # name: what is done before the model is traced
    AS_IT_IS: [],
    "plain gradient of products": [plain_products],
    "plain gradient of attention": [plain_attention],
    "both plain": [plain_products, plain_attention],
    "small pages": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            print(f"{name:<40}{middle:>16.4f}{ratio:>8.2f}{min(ratios):>8.2f}{max(ratios):>9.2f}", flush=True)


def measure(config: str, variants: list[str], turns: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a step of each variant, turn by turn."""
    servers = {name: Server(config, name) for name in variants}
    try:
        times = {name: [] for name in variants}
        for _ in range(turns):
            for name, server in servers.items():
                times[name].append(server.seconds_per_step(seconds))
        return times
    finally:
        for server in servers.values():
            server.close()


class Server:
    """The process of a variant; it has compiled its step when this returns, and rests until it is asked."""

    def __init__(self, config: str, variant: str):
        pages = f"glibc.malloc.hugetlb={int(variant != 'small pages')}"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--config", config, "--serve", variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLIBC_TUNABLES": pages},
        )
        self._answer()

    def _answer(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a variant's process ended: what it said is above")
        return float(line)

    def seconds_per_step(self, seconds: float) -> float:
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(config: str, variant: str) -> None:
    """Says 0 when the step is compiled; then, for every line with a number of seconds, the seconds a step took."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is said must not look like an answer
    for change in VARIANTS[variant]:
        change()
    import jax
    from packing import Side

    from vlm_jax import config_file
    from vlm_jax.data import pipeline

    cfg = config_file.load(config)
    side = Side(cfg, pipeline.train_tokenizer(cfg))
    print(0, file=answers, flush=True)
    with jax.set_mesh(side.mesh):
        for line in sys.stdin:
            begun, steps = time.perf_counter(), 0
            while steps < 2 or time.perf_counter() - begun < float(line):
                side.take_step()
                steps += 1
            print((time.perf_counter() - begun) / steps, file=answers, flush=True)


if __name__ == "__main__":
    main()
