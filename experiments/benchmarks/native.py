"""Native resolution against squares of the same mean number of patches, in training.

    python experiments/benchmarks/native.py [--fusion unified cross_attention]

64 crops of scikit-learn's two photographs, of 64 to 640 px and any shape, each with a caption. An
encoder and a decoder of 2 blocks of width 512, patches of 16 px, 2 x 2 of them a token. At native
resolution an image has at most 256 patches, and a row 512; in the other runs every image is a
square of the mean number of patches, and a row has as many as fit 512. Both train on packed rows
and take turns in one process. Tokens are of images and of text, without padding.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import report
from packing import Side
from report import Result

sys.path.insert(0, str(Path(__file__).parents[2]))

from vlm_jax.runtime.process import prepare_process

IMAGES, TURNS = 64, 5
PATCH_PX, SQUARE, MAX_PATCHES, PATCHES_PER_ROW = 16, 2, 256, 512
SIZE = {"width": 512, "mlp_width": 2048, "depth": 2, "heads": 8, "unroll": 1}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fusion", nargs="+", default=["unified", "cross_attention"])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn of a side")
    report.add_option(parser)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = write_photographs(Path(folder))
        for kind in arguments.fusion:
            results += compare(kind, Path(folder), sizes, arguments.seconds)
    report.write(results, arguments.json)


def write_photographs(folder: Path) -> list[tuple[int, int]]:
    """Writes crops of photographs with their captions; returns their (height, width) in px."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng, photographs = np.random.default_rng(0), load_sample_images().images
    talks, sizes = [], []
    for number in range(IMAGES):
        photograph = photographs[number % len(photographs)]
        height, width = rng.integers(64, photograph.shape[:2], endpoint=True)
        top, left = rng.integers(0, np.subtract(photograph.shape[:2], (height, width)) + 1)
        crop = photograph[top : top + height, left : left + width]
        Image.fromarray(crop).save(folder / f"{number}.png")
        caption = f"part of {height} x {width} px, {top} px from above and {left} px from the left"
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        talks.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        sizes.append((int(height), int(width)))
    (folder / "talks.json").write_text(json.dumps(talks))
    return sizes


def experiment(kind: str, folder: Path):
    """Returns the experiment at native resolution."""
    from configs.your_data import native
    from vlm_jax.config import Data

    cfg = native.get_config()
    data = Data(
        source="conversations",
        files=(str(folder / "talks.json"),),
        image_dir=str(folder),
        dir=str(folder / "datasets"),
        template="caption",
        images_per_row=32,
        patches_per_row=PATCHES_PER_ROW,
        text_length=288,
        augment=(),
    )
    vision = {"patch_size_px": PATCH_PX, "patch_square": SQUARE, "max_patches": MAX_PATCHES}
    return replace(
        cfg,
        data=data,
        vision=replace(cfg.vision, **SIZE, **vision),
        fusion=replace(cfg.fusion, kind=kind),
        decoder=replace(cfg.decoder, **SIZE),
        train=replace(cfg.train, batch_size=4),
    )


def with_squares(cfg, sizes: list[tuple[int, int]]):
    """Returns the experiment with squares of the mean number of patches of these images."""
    from vlm_jax.data import native

    shapes = [native.resized_shape(*size, cfg.vision) for size in sizes]
    mean = statistics.fmean(native.count_squares(shape, cfg.vision) for shape in shapes)
    squares = round(math.sqrt(mean))
    side = squares * cfg.vision.square_px
    vision = replace(cfg.vision, image_size_px=side, max_patches=None, patch_square=1)
    images_per_row = PATCHES_PER_ROW // (squares * SQUARE) ** 2
    data = replace(cfg.data, images_per_row=images_per_row, patches_per_row=None)
    return replace(cfg, vision=vision, data=data)


class TokenSide(Side):
    """A run that counts tokens, and slots of patches and those that are empty."""

    def __init__(self, cfg, tokenizer):
        self.cfg, self.slots, self.empty = cfg, 0, 0
        super().__init__(cfg, tokenizer)

    def count(self, batch) -> int:
        """Returns the number of tokens of a batch without padding."""
        cfg = self.cfg
        if cfg.vision.is_native:
            patches = int((batch.patch_images != 0).sum())
            images = patches // SQUARE**2
            self.slots += batch.patch_images.size
            self.empty += batch.patch_images.size - patches
        else:
            images = int(batch.image_mask.any(axis=1).sum()) * cfg.image_tokens
        text = batch.segment_ids != 0
        if cfg.fusion.image_in_sequence:
            text = text & (batch.image_token_index < 0)
        return images + int(text.sum())


def compare(kind: str, folder: Path, sizes: list[tuple[int, int]], seconds: float) -> list[Result]:
    from vlm_jax.data import pipeline

    cfg = experiment(kind, folder)
    tokenizer = pipeline.train_tokenizer(cfg)
    sides = [TokenSide(cfg, tokenizer), TokenSide(with_squares(cfg, sizes), tokenizer)]
    speeds = [tuple(side.count_per_second(seconds) for side in sides) for _ in range(TURNS)]
    native, squares = zip(*speeds)
    ratios = [a / b for a, b in speeds]
    padding = sides[0].empty / sides[0].slots
    print(f"{kind}: {statistics.median(native):.0f} and {statistics.median(squares):.0f} tokens/s")
    name = f"native resolution, {kind}"
    return [
        Result.of(name, "times the tokens/s of squares", ratios, max(native) / max(squares)),
        Result.of(f"{name}: empty slots", "of patches", [padding]),
    ]


if __name__ == "__main__":
    prepare_process()
    main()
