"""A tiny experiment and batches for it, for tests and quick trials."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from flax.linen import meta
from PIL import Image

from vlm_jax.config import (
    FUSION_STYLES,
    Data,
    Decoder,
    Experiment,
    Fusion,
    Optim,
    Projector,
    Train,
    Vision,
)
from vlm_jax.data import batching, text, tiling
from vlm_jax.data.tokenizer import SPECIALS
from vlm_jax.nn.models import abstract_params
from vlm_jax.structs import Batch

COLORS = {
    "red": (200, 30, 40),
    "green": (20, 140, 60),
    "blue": (40, 60, 200),
    "white": (250, 250, 250),
}
# Fusion styles with images.
KINDS = tuple(kind for kind in FUSION_STYLES if Fusion(kind).has_images)


def tiny(kind: str = "unified", **sections) -> Experiment:
    """Returns an experiment with images of 4 patches, two blocks of width 32 and 300 tokens.

    `sections` replace whole sections.
    """
    small = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 64}
    cfg = Experiment(
        data=Data(questions_per_row=3, text_length=24, augment=()),
        vision=Vision(image_size_px=16, patch_size_px=8, **small),
        projector=Projector(kind="linear", heads=4, queries=3, depth=1),
        fusion=Fusion(kind=kind),
        decoder=Decoder(**small, kv_heads=2, vocab_size=300, max_positions=64),
        optim=Optim(warmup_steps=1),
        train=Train(steps=4, batch_size=8, log_every_steps=1, checkpoint_every_steps=2),
    )
    return dataclasses.replace(cfg, **sections)


def variants() -> dict[str, Experiment]:
    """Returns a tiny experiment of every fusion style with images, and one without an encoder."""
    unified = tiny()
    encoder_free = dataclasses.replace(unified.vision, kind="none", newline_token=True)
    return {kind: tiny(kind) for kind in KINDS} | {"encoder_free": tiny(vision=encoder_free)}


def hybrid_in_tiles() -> Experiment:
    """Returns a hybrid experiment with images of at most two tiles, with tags."""
    return tiny("hybrid", vision=dataclasses.replace(tiny().vision, tiles=2))


def on_easy_vqa(cfg: Experiment) -> Experiment:
    """Returns the experiment for images of 64 px (of four tiles, if tiled) and longer rows."""
    tiles = {"image_size_px": 32, "tiles": 4} if cfg.vision.tiles > 1 else {"image_size_px": 64}
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, train_split="train[:40]", text_length=100),
        vision=dataclasses.replace(cfg.vision, patch_size_px=16, **tiles),
        decoder=dataclasses.replace(cfg.decoder, max_positions=128),
    )


def variants_and_tiles() -> dict[str, Experiment]:
    """`variants`, and `hybrid_in_tiles`."""
    return variants() | {"hybrid in tiles": hybrid_in_tiles()}


def random_params(cfg: Experiment, spread: float = 0.1, seed: int = 0):
    """Returns random parameters: scales around 1, all others around 0 but not 0, so gates are open.

    Nothing is compiled for them.
    """
    rng = np.random.default_rng(seed)
    shapes = meta.unbox(abstract_params(cfg))

    def numbers(path, shape):
        return rng.normal(float(path[-1] == "scale"), spread, shape.shape).astype(shape.dtype)

    return traverse_util.path_aware_map(numbers, shapes)


def random_batch(cfg: Experiment, rows: int = 4, seed: int = 0) -> Batch:
    """Returns rows of a random image and `questions_per_row` random questions, packed for training.

    If images are split into tiles, row i has the i-th layout.
    """
    rng = np.random.default_rng(seed)

    def question_and_answer():
        question, answer = rng.integers(3, 6), rng.integers(1, 3)
        ids = rng.integers(len(SPECIALS), cfg.decoder.vocab_size, question + answer)
        return list(ids[:question]), list(ids[question:])

    side = cfg.vision.image_size_px
    layouts = cfg.vision.tile_grids or tiling.layouts(cfg.vision.cut_tiles)
    packed, tiles = [], {}
    for row in range(rows):
        height, width = layouts[row % len(layouts)]
        pixels = rng.uniform(-1, 1, (height * side, width * side, 3)).astype(np.float32)
        pairs = [question_and_answer() for _ in range(cfg.data.questions_per_row)]
        tiles[row, 0] = tiling.describe_tiles(pixels, cfg.vision)
        fields = text.pack_row(cfg, pairs, tiles[row, 0])
        packed.append(fields | {"images": tiling.stack_views([pixels], cfg.vision)})
    fields = jax.tree.map(lambda *arrays: np.stack(arrays), *packed)
    return Batch(**fields, map_memory=batching.map_memory(cfg, tiles, (rows, 1)))


def write_conversations(folder: Path, count: int = 12, seed: int = 0) -> Data:
    """Writes `count` conversations about the colors of 0 to 2 images in LLaVA's format.

    The folder receives `talks.json`, the images and the prepared datasets.

    Returns:
      the section of an experiment that loads them.
    """
    rng, talks = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colors = [str(color) for color in rng.choice(list(COLORS), i % 3)]
        files = [f"{i}_{k}.{'png' if k else 'jpg'}" for k in range(len(colors))]
        for file, color in zip(files, colors):
            Image.new("RGB", (24, 18), COLORS[color]).save(folder / file)
        placeholders = "".join("<image>\n" for _ in files)
        texts = [f"{placeholders}what do you see in {i}?", ", ".join(colors) or "no image"]
        texts += ["is that all?", "yes"] * int(rng.integers(3))
        messages = [{"from": ("human", "gpt")[k % 2], "value": x} for k, x in enumerate(texts)]
        talk = {"id": f"talk {i}", "conversations": messages}
        if files:
            talk["image"] = files[0] if len(files) == 1 else files
        talks.append(talk)
    (folder / "talks.json").write_text(json.dumps(talks))
    return Data(
        source="conversations",
        files=(str(folder / "talks.json"),),
        image_dir=str(folder),
        dir=str(folder / "datasets"),
        images_per_row=3,
        text_length=80,
        augment=(),
    )
