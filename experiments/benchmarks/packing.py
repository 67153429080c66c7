"""Training questions per second: several that share an image in a row, against one a row.

    python experiments/benchmarks/packing.py [--config configs/easy_vqa/unified.py ...]

Both sides take the real optimizer step on the real data, with the same number of rows (images) in a
batch. Rows of one question are cut to the longest question with its answer, the best case without
packing. The sides alternate in one process, so that other work on the machine slows both; a side's
speed is the median of its turns.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import report
from report import Result

sys.path.insert(0, str(Path(__file__).parents[2]))

from vlm_jax.runtime.process import prepare_process

CONFIGS = [
    f"configs/easy_vqa/{name}.py"
    for name in ("unified", "cross_attention", "encoder_decoder", "encoder_free")
]
TURNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", nargs="+", default=CONFIGS, help="default: the four of easy-VQA"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each of the five turns of a side"
    )
    report.add_option(parser)
    arguments = parser.parse_args()

    from vlm_jax.config import files

    results = []
    print(f"{'config':<40}{'packed':>12}{'one a row':>12}{'ratio':>8}   (questions a second)")
    for path in arguments.config:
        speeds = compare(files.load(path), arguments.seconds)
        packed, single = map(statistics.median, zip(*speeds))
        print(f"{path:<40}{packed:>12.0f}{single:>12.0f}{packed / single:>8.2f}", flush=True)
        name = f"packed questions, {Path(path).stem}"
        results.append(Result.of(name, "times one per row", [a / b for a, b in speeds]))
    report.write(results, arguments.json)


def compare(cfg, seconds: float) -> list[tuple[float, float]]:
    """Returns questions per second packed as configured, and one a row, turn by turn."""
    from vlm_jax.data import pipeline

    tokenizer = pipeline.train_tokenizer(cfg)
    sides = [Side(cfg, tokenizer), Side(batch_views(cfg, tokenizer), tokenizer)]
    return [tuple(side.count_per_second(seconds) for side in sides) for _ in range(TURNS)]


def batch_views(cfg, tokenizer):
    """Returns the experiment with rows of one question, cut to the longest with its answer."""
    from vlm_jax.data import length_check

    longest = sum(map(len, length_check.longest_pair(cfg, tokenizer)))
    return replace(cfg, data=replace(cfg.data, questions_per_row=1, text_length=longest))


class Side:
    """A run in memory: its data, state and compiled step."""

    def __init__(self, cfg, tokenizer, params=None):
        """`params`: path -> initial parameter; others are random."""
        import jax

        from vlm_jax import axes
        from vlm_jax.data import pipeline
        from vlm_jax.train.step import init_sharded_state, jit_train_step

        self.mesh = axes.make_mesh(cfg.mesh)
        with jax.set_mesh(self.mesh):
            self.state = init_sharded_state(cfg, self.mesh, params or {})
            self.data = pipeline.training_iterator(cfg, tokenizer)
            self.step = jit_train_step(cfg, self.mesh)
            for _ in range(2):
                self.take_step()

    def take_step(self) -> int:
        """Trains on the next batch; returns its `count`."""
        batch = next(self.data)
        self.state, metrics = self.step(self.state, batch)
        metrics["loss"].block_until_ready()
        return self.count(batch)

    def count(self, batch) -> int:
        """Returns the number of questions of a batch."""
        return int(batch.branch_ids.max(axis=1).sum())

    def count_per_second(self, seconds: float) -> float:
        import jax

        start, count = time.perf_counter(), 0
        with jax.set_mesh(self.mesh):
            while time.perf_counter() - start < seconds:
                count += self.take_step()
        return count / (time.perf_counter() - start)


if __name__ == "__main__":
    prepare_process()
    main()
