"""Gemma 3 with images: SigLIP, averages of its tokens, their norm and projection, and Gemma 3.

The tokens of an image attend to each other in both directions, text is causal (Gemma Team 2025,
section 2).
"""

import math
from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import CheckpointError, Experiment, Fusion, Projector, Vision
from vlm_jax.hub.families.decoders import gemma, llama
from vlm_jax.hub.families.encoders import siglip
from vlm_jax.hub.families.family import (
    Family,
    HfProcessor,
    Json,
    get_or,
    positive_int,
    text_experiment,
)
from vlm_jax.hub.families.multimodal.llava import (
    HEAD,
    MODULE_NAMES,
    PROJECTOR,
    RENAMES,
    TEXT,
    TOWER,
    choose_nested,
    text_from_hf,
)
from vlm_jax.hub.families.table import Row, row

TOWERS = {"siglip_vision_model": siglip}
TEXTS = {gemma.GEMMA3.model_type: gemma.GEMMA3}
TOKENS_PER_IMAGE = "mm_tokens_per_image"


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    tower_config = get_or(config, "vision_config", {})
    choose_nested("vision_config", tower_config, TOWERS, "siglip_vision_model")
    vision = siglip.vision_from_hf(tower_config)
    decoder = text_from_hf(config, names, TEXTS, "gemma3_text")
    return Experiment(
        vision=vision,
        projector=Projector(
            kind="average_pool",
            factor=_pool_factor(vision, positive_int(config, TOKENS_PER_IMAGE, 256)),
            norm="rmsnorm_zero_centered",
            norm_eps=vision.norm_eps,
            bias=False,
        ),
        fusion=Fusion(kind="unified", prefix="bidirectional_images"),
        # transformers applies final_logit_softcapping in the text-only model alone.
        decoder=replace(decoder, logit_softcap=None),
    )


def _pool_factor(vision: Vision, tokens: int) -> int:
    """Returns f, for f x f patches that are averaged to one of `tokens` tokens.

    Raises:
      CheckpointError: the patches cannot be divided into equal squares.
    """
    rows, side = vision.grid[0], math.isqrt(tokens)
    if side**2 != tokens or rows % side:
        raise CheckpointError(
            f"config.json: {TOKENS_PER_IMAGE} {tokens} is not supported: the {rows} x {rows} "
            "patches of an image cannot be averaged in as many equal squares."
        )
    return rows // side


def config_to_hf(cfg: Experiment) -> Json:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": siglip.vision_to_hf(cfg.vision),
        "text_config": gemma.GEMMA3.config_to_hf(text_experiment(cfg.decoder)),
        TOKENS_PER_IMAGE: cfg.image_tokens,
        "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
    }


def param_table(cfg: Experiment) -> list[Row]:
    return [
        *siglip.vision_rows(cfg.vision, TOWER, "vision/"),
        llama.norm_row(f"{PROJECTOR}mm_soft_emb_norm", "projector/norm"),
        row(f"{PROJECTOR}mm_input_projection_weight", "projector/linear/kernel"),
        *llama.decoder_rows(cfg.decoder, cfg.fusion, TEXT, HEAD),
    ]


GEMMA3 = Family(
    "gemma3",
    config_from_hf,
    config_to_hf,
    param_table,
    RENAMES,
    gemma.TOLERANCE,
    image_token=262144,
    processor=HfProcessor(
        "Gemma3Processor",
        resize="squash",
        has_prompt_format=True,
        counts_image_tokens=True,
        image_processor="Gemma3ImageProcessor",
    ),
    module_names=MODULE_NAMES,
)
