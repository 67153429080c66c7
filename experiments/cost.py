"""Costs of an image token by fusion style: nothing is trained, and every number is the same again.

    python experiments/cost.py > experiments/results/cost/report.md

First at the shapes of NVLM's 34B models (Dai et al. 2024, arXiv 2409.11402), which measured the
throughput of the three styles (table 3). Then at the size of the other studies, from 16 to 1,024
image tokens: where does cross-attention begin to cost less?
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402

from configs.synthetic.glyphs_typewritten_unified import get_config  # noqa: E402
from experiments.settings import CROSS  # noqa: E402
from vlm_jax.config import (  # noqa: E402
    Data,
    Decoder,
    Experiment,
    Fusion,
    LrMult,
    Optim,
    Projector,
    Train,
    Vision,
)
from vlm_jax.config.validate import validate  # noqa: E402
from vlm_jax.cost.flops import token_flow, train_flops  # noqa: E402
from vlm_jax.plan.document import part_costs  # noqa: E402
from vlm_jax.study import override  # noqa: E402
from vlm_jax.study.report.costs import image_cache_bytes  # noqa: E402

MIB = 2**20
# InternViT-6B, frozen, and Yi-34B; an image of 448 px in six tiles and a thumbnail.
NVLM_34B = Experiment(
    data=Data(source="conversations", files=("any.json",), text_length=1024, augment=()),
    vision=Vision(
        width=3200,
        depth=45,
        heads=25,
        mlp_width=12_800,
        image_size_px=448,
        patch_size_px=14,
        tiles=6,
    ),
    projector=Projector(kind="pixel_shuffle", factor=2),
    decoder=Decoder(
        width=7168,
        depth=60,
        heads=56,
        kv_heads=8,
        mlp_width=20_480,
        norm="rmsnorm",
        activation="silu",
        gated_mlp=True,
        vocab_size=64_000,
        max_positions=4096,
    ),
    optim=Optim(lr_mult=LrMult(vision=0.0)),
    train=Train(batch_size=1),
)
STYLES = {
    "unified": Fusion("unified"),
    "cross_attention": Fusion("cross_attention", cross_every=4, gated=True),
    "hybrid": Fusion("hybrid", cross_every=4, gated=True),
}
NAMES = {"unified": "NVLM-D", "cross_attention": "NVLM-X", "hybrid": "NVLM-H"}
# Samples a second on 128 H100, table 3.
PUBLISHED = {"unified": 28.8, "cross_attention": 50.6, "hybrid": 36.2}
# Image tokens -> pixels of an image; patches of 8 px.
SIZES_PX = {16: 32, 64: 64, 256: 128, 1024: 256}
TEXT_TOKENS = (32, 116)


def nvlm_shapes() -> dict[str, Experiment]:
    """Returns style -> experiment at the shapes of NVLM's 34B models."""
    return {
        kind: validate(Experiment(**{**vars(NVLM_34B), "fusion": fusion}))
        for kind, fusion in STYLES.items()
    }


def nvlm_rows() -> list[list[str]]:
    """Returns a row for each style: tokens, parameters, FLOPs, speed, cache."""
    costs = {kind: train_flops(cfg) for kind, cfg in nvlm_shapes().items()}
    rows = []
    for kind, cfg in nvlm_shapes().items():
        parameters = sum(part["parameters"] for part in part_costs(cfg).values())
        tokens = token_flow(cfg)
        rows.append(
            [
                f"`{kind}` ({NAMES[kind]})",
                f"{tokens.sequence:,}",
                f"{tokens.memory:,}",
                f"{parameters / 1e9:.1f}",
                f"{costs[kind] / 1e12:,.0f}",
                f"{costs['unified'] / costs[kind]:.2f}",
                f"{PUBLISHED[kind] / PUBLISHED['unified']:.2f}",
                f"{image_cache_bytes(cfg) / MIB:,.0f}",
            ]
        )
    return rows


def crossing_ratio(image_tokens: int, text_tokens: int, cross_every: int) -> float:
    """Returns training FLOPs of `unified` divided by training FLOPs of `cross_attention`."""
    fields = {
        "vision.image_size_px": SIZES_PX[image_tokens],
        "projector.kind": "linear",
        "data.text_length": text_tokens,
        "decoder.max_positions": 2048,
    }
    base = override(get_config(), fields)
    cross = {"fusion.kind": "cross_attention", "fusion.cross_every": cross_every, **CROSS}
    return train_flops(base) / train_flops(override(base, cross))


def crossing_rows() -> list[list[str]]:
    """Returns a row for each number of text tokens and interval of the cross-attention blocks."""
    rows = []
    for text_tokens in TEXT_TOKENS:
        for every in (1, 4):
            ratios = [crossing_ratio(tokens, text_tokens, every) for tokens in SIZES_PX]
            rows.append([str(text_tokens), str(every), *(f"{ratio:.2f}" for ratio in ratios)])
    return rows


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    print("# What does an image token cost?\n\n`python experiments/cost.py`\n")
    print("## At the shapes of NVLM-34B\n")
    print(
        "Training FLOPs of a row: an image of six tiles and a thumbnail, 1,024 text tokens, frozen "
        "encoder, a block of cross-attention before every fourth decoder block. Speed is the "
        "inverse of the FLOPs. NVLM measured samples a second on 128 H100 (table 3).\n"
    )
    print_table(
        [
            "style",
            "tokens in the sequence",
            "in cross-attention",
            "parameters, 1e9",
            "TFLOP a row",
            "speed here",
            "NVLM's",
            "cache of an image in float32, MiB",
        ],
        nvlm_rows(),
    )
    print("\n## Where the two cross\n")
    print(
        "Ratio of training FLOPs, `unified` to `cross_attention`, at the size of the other "
        "studies: above 1, cross-attention costs less.\n"
    )
    print_table(
        ["text tokens", "cross-attention every", *(f"{n:,} image tokens" for n in SIZES_PX)],
        crossing_rows(),
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
