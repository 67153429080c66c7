"""The input pipeline against the training step: batches made during a step.

    python experiments/benchmarks/input_pipeline.py [--seconds 10]

easy-VQA with `configs/easy_vqa/unified.py`, and photographs: JPEGs of 640 x 480 px with the same
questions, resized to 336 px for a model of 35 M parameters, batch 8. Decoded photographs are not
cached, so that every row pays for its image. Step and pipeline alternate in one process.
"""

import argparse
import io
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import report
import turns
from packing import Side
from PIL import Image
from report import Result

sys.path.insert(0, str(Path(__file__).parents[2]))

from vlm_jax.runtime.process import prepare_process

TURNS, PHOTOGRAPHS = 5, 64


def photograph(seed: int) -> bytes:
    """A JPEG as heavy as a photograph: smooth, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    pixels = np.clip(np.asarray(coarse) + rng.normal(0, 8, (480, 640, 3)), 0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


class Photographs:
    """Records with photographs instead of their images."""

    def __init__(self, records):
        self._records, self._images = records, [photograph(seed) for seed in range(PHOTOGRAPHS)]
        self.title = "photographs"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int):
        if index >= len(self):
            raise IndexError(index)
        return replace(self._records[index], image=self._images[index % PHOTOGRAPHS])


def show_photographs() -> None:
    """Makes every dataset one of photographs from here on."""
    from vlm_jax.data import sources, tiling

    load = sources.load
    sources.load = lambda *arguments: Photographs(load(*arguments))
    tiling.CACHE_BYTES = 0


def photograph_config(cfg):
    vision = {
        "image_size_px": 336,
        "patch_size_px": 14,
        "width": 384,
        "depth": 6,
        "heads": 6,
        "mlp_width": 1536,
    }
    decoder = {
        "width": 512,
        "depth": 8,
        "heads": 8,
        "kv_heads": 4,
        "mlp_width": 1376,
        "gated_mlp": True,
    }
    return replace(
        cfg,
        data=replace(cfg.data, augment=("mirror",)),
        vision=replace(cfg.vision, **vision, unroll=6),
        decoder=replace(cfg.decoder, **decoder, unroll=8),
        train=replace(cfg.train, batch_size=8),
        optim=replace(cfg.optim, kind="adamw"),
    )


def compare(name: str, cfg, seconds: float) -> Result:
    import jax

    from vlm_jax.data import pipeline

    tokenizer = pipeline.train_tokenizer(cfg)
    side, data = Side(cfg, tokenizer), pipeline.training_iterator(cfg, tokenizer)
    batch, steps, batches = next(data), [], []

    def step():
        side.state, metrics = side.step(side.state, batch)
        metrics["loss"].block_until_ready()

    def mean_of_many():
        # Far more than are prefetched.
        for _ in range(4 * cfg.data.prefetch):
            next(data)

    for _ in range(TURNS):
        with jax.set_mesh(side.mesh):
            steps.append(turns.times(step, seconds)["seconds"])
        batches.append(turns.times(mean_of_many, seconds)["seconds"] / (4 * cfg.data.prefetch))
    ratios = [step / batch for step, batch in zip(steps, batches)]
    rows = [cfg.train.batch_size / statistics.median(seconds) for seconds in (steps, batches)]
    print(f"{name:<24}{rows[0]:>12.0f}{rows[1]:>12.0f}", flush=True)
    return Result.of(f"input pipeline, {name}", "times the step's speed", ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="minimum of each turn")
    report.add_option(parser)
    options = parser.parse_args()
    seconds = options.seconds

    from vlm_jax.config import files

    cfg = files.load("configs/easy_vqa/unified.py")
    print(f"{'rows a second':<24}{'step':>12}{'pipeline':>12}")
    results = [compare("easy-VQA, 64 px", cfg, seconds)]
    show_photographs()
    results.append(compare("JPEGs of 336 px", photograph_config(cfg), seconds))
    report.write(results, options.json)


if __name__ == "__main__":
    prepare_process()
    main()
