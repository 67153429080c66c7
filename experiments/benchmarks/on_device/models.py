"""Experiments of 0.4 B and 1 B parameters, and random batches for any experiment.

0.4 B: SigLIP-B/16 and a decoder with SmolLM2-360M's sizes. 1 B: CLIP ViT-L/14 at 336 px and a
decoder of 16 layers with TinyLlama's sizes. Rows hold several conversations, each about an image:
2,048 tokens with the image tokens in the sequence.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np
from flax.linen import meta

from configs.published import clip_l14_336_gpt2, llama_3_2_1b
from vlm_jax.config import (
    CHANNELS,
    Data,
    Decoder,
    Experiment,
    Fusion,
    Optim,
    Projector,
    Rope,
    Train,
    Vision,
)
from vlm_jax.nn.models import initializer
from vlm_jax.structs import NO_IMAGE, PADDING, Batch

SIGLIP_B_16 = Vision(
    width=768, depth=12, heads=12, mlp_width=3072, image_size_px=224, patch_size_px=16
)
LLAMA = replace(llama_3_2_1b.DECODER, rope=Rope())
SMOLLM2_360M = replace(
    LLAMA, width=960, depth=32, heads=15, kv_heads=5, mlp_width=2560, vocab_size=49_152
)
TINYLLAMA_16 = replace(LLAMA, mlp_width=5632, vocab_size=32_000)


@dataclass(frozen=True)
class Size:
    vision: Vision
    decoder: Decoder
    images: int  # per row
    text_length: int  # tokens of text per row
    rows: int  # per step, unless fewer fit


# Values of a slot of padding.
EMPTY = {
    "positions": 0,
    "segment_ids": PADDING,
    "image_token_index": NO_IMAGE,
    "image_mask": False,
}
TINY = {"width": 64, "depth": 2, "heads": 4, "mlp_width": 128}
SIZES = {
    "0.4B": Size(SIGLIP_B_16, SMOLLM2_360M, images=4, text_length=1264, rows=16),
    "1B": Size(clip_l14_336_gpt2.VISION, TINYLLAMA_16, images=2, text_length=896, rows=16),
    # Without an encoder, which takes half of the compile time.
    "tiny": Size(
        Vision(kind="none", image_size_px=32, patch_size_px=8),
        replace(LLAMA, **TINY, kv_heads=2, vocab_size=512, max_positions=256),
        images=2,
        text_length=32,
        rows=4,
    ),
}


def experiment(kind: str, size: str) -> Experiment:
    """Returns the experiment that trains all parameters of a fusion style in bfloat16."""
    sizes = SIZES[size]
    cross_every = 4 if kind == "cross_attention" and sizes.decoder.depth > 4 else 1
    return Experiment(
        data=Data(images_per_row=sizes.images, text_length=sizes.text_length, augment=()),
        vision=replace(sizes.vision, remat="attention"),
        projector=Projector("mlp"),
        fusion=Fusion(kind, cross_every=cross_every),
        decoder=replace(sizes.decoder, remat="attention"),
        # A rate at which a new model of any size learns.
        optim=Optim(learning_rate=1e-4, warmup_steps=1),
        train=Train(batch_size=sizes.rows, compute_dtype="bfloat16"),
    )


def training_batch(cfg: Experiment, seed: int = 0) -> Batch:
    """Returns rows of one conversation per image, each of as many tokens, with padding at the end.

    The second half of each conversation's text is scored.
    """
    images, image_slots = cfg.data.images_per_row, cfg.image_slots_in_row
    text_slots = cfg.data.text_length // images
    segments = [segment(cfg, image, text_slots, images) for image in range(images)]
    row = {name: np.concatenate([fields[name] for fields in segments]) for name in segments[0]}
    row["segment_ids"][-text_slots // 4 :] = PADDING
    inside = row["positions"] - image_slots
    rng = np.random.default_rng(seed)
    shape = (cfg.train.batch_size, cfg.row_length)
    is_scored = (inside >= text_slots // 2) & (row["segment_ids"] != PADDING)
    return Batch(
        **{name: np.broadcast_to(x, (shape[0], *x.shape)) for name, x in row.items()},
        tokens=random_tokens(cfg, shape, rng),
        images=random_images(cfg, shape[0], images, rng),
        targets=random_tokens(cfg, shape, rng),
        loss_weights=np.broadcast_to(is_scored.astype(np.float32), shape),
    )


def prompt_batch(cfg: Experiment, rows: int, text_slots: int, padding: int = 0) -> Batch:
    """Returns prompts of an image and `text_slots` tokens; row i begins with i * `padding` slots.

    Padding takes the place of text.
    """
    prompts = [
        pad_left(segment(cfg, 0, text_slots - i * padding, images=1), i * padding)
        for i in range(rows)
    ]
    fields = {name: np.stack([prompt[name] for prompt in prompts]) for name in prompts[0]}
    if cfg.fusion.is_prefix_lm:
        fields["block_ids"] = (fields["segment_ids"] != PADDING).astype(np.int32)
    rng = np.random.default_rng(0)
    tokens = random_tokens(cfg, fields["positions"].shape, rng)
    return jax.device_put(Batch(**fields, tokens=tokens, images=random_images(cfg, rows, 1, rng)))


def segment(cfg: Experiment, image: int, text_slots: int, images: int) -> dict[str, np.ndarray]:
    """Returns the fields of one conversation, the `image`-th of a row: its image, then text."""
    slots = cfg.image_slots_in_row
    length = slots + text_slots
    image_token_index = np.full(length, NO_IMAGE, np.int32)
    image_token_index[:slots] = image * slots + np.arange(slots)
    return {
        "positions": np.arange(length, dtype=np.int32),
        "segment_ids": np.full(length, image + 1, np.int32),
        "image_token_index": image_token_index,
        "image_mask": np.broadcast_to(np.arange(images) == image, (length, images)),
    }


def pad_left(fields: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {
        name: np.concatenate([np.full((count, *x.shape[1:]), EMPTY[name], x.dtype), x])
        for name, x in fields.items()
    }


def random_tokens(cfg: Experiment, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.integers(cfg.decoder.vocab_size, size=shape, dtype=np.int32)


def random_images(cfg: Experiment, rows: int, images: int, rng: np.random.Generator) -> np.ndarray:
    side = cfg.vision.image_size_px
    return rng.standard_normal((rows, images, side, side, CHANNELS), np.float32)


def random_params(cfg: Experiment, dtype: str):
    """Returns initial parameters in `dtype`."""

    @jax.jit
    def init(key):
        return jax.tree.map(lambda x: x.astype(dtype), meta.unbox(initializer(cfg)(key)))

    return init(jax.random.key(0))
