"""Share of empty slots in packed rows, by the number of rows open at a time.

    python experiments/benchmarks/packing_window.py [--conversations 20000]

Lengths are drawn as in LLaVA's second stage: log-normal text of 280 tokens on average and, in 94 of
100 conversations, an image of 576 tokens. Packing is Grain's, as in training
(`vlm_jax/data/packing.py`).
"""

import argparse
import math

import grain
import numpy as np

TEXT_TOKENS, SPREAD, IMAGE_TOKENS, WITH_IMAGE = 280, 0.6, 576, 0.94
# Tokens and images of a row.
ROWS = ((2048, 3), (4096, 6))
WINDOWS = (1, 8, 64, 512)


def conversations(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    has_image = rng.random(count) < WITH_IMAGE
    text = rng.lognormal(math.log(TEXT_TOKENS) - SPREAD**2 / 2, SPREAD, count).astype(int) + 1
    tokens, images = text + IMAGE_TOKENS * has_image, has_image.astype(int)
    return [
        {"tokens": np.ones(a, np.int8), "images": np.ones(b, np.int8)}
        for a, b in zip(tokens, images)
    ]


def empty_share(
    elements: list[dict[str, np.ndarray]], tokens: int, images: int, window: int
) -> float:
    capacity = {"tokens": tokens, "images": images}
    cut = [
        {name: values[: capacity[name]] for name, values in element.items()} for element in elements
    ]
    packed = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(cut).to_iter_dataset(),
        length_struct=capacity,
        num_packing_bins=window,
    )
    return float(np.mean([np.mean(row["tokens"] == 0) for row in packed]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=20_000)
    elements = conversations(parser.parse_args().conversations)
    print(
        f"{'tokens, images of a row':<26}" + "".join(f"{f'{window} open':>9}" for window in WINDOWS)
    )
    for tokens, images in ROWS:
        shares = [empty_share(elements, tokens, images, window) for window in WINDOWS]
        print(
            f"{f'{tokens}, {images}':<26}" + "".join(f"{share:>9.2f}" for share in shares),
            flush=True,
        )


if __name__ == "__main__":
    main()
