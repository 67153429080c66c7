"""PaliGemma 1 and 2: SigLIP, a linear projector, and Gemma or Gemma 2.

Image and prompt are a prefix with bidirectional attention (prefix-LM).
"""

from collections.abc import Collection

from vlm_jax.config import Experiment, Fusion, Projector
from vlm_jax.hub.families.decoders import gemma, llama
from vlm_jax.hub.families.encoders import siglip
from vlm_jax.hub.families.family import (
    Family,
    HfProcessor,
    Json,
    get_or,
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
from vlm_jax.hub.families.table import Row

TOWERS = {"siglip_vision_model": siglip}
TEXTS = {family.model_type: family for family in (gemma.GEMMA, gemma.GEMMA2)}


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    tower_config = get_or(config, "vision_config", {})
    choose_nested("vision_config", tower_config, TOWERS, "siglip_vision_model")
    # The batch marks the bidirectional prefix; the decoder itself is causal.
    causal = {"use_bidirectional_attention": False}
    text = get_or(config, "text_config", {}) | causal
    return Experiment(
        vision=siglip.vision_from_hf(tower_config),
        projector=Projector(kind="linear"),
        fusion=Fusion(kind="unified", prefix="bidirectional"),
        decoder=text_from_hf(config | {"text_config": text}, names, TEXTS, "gemma"),
    )


def config_to_hf(cfg: Experiment) -> Json:
    family = gemma.GEMMA2 if cfg.decoder.norm_position == "sandwich" else gemma.GEMMA
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "vision_config": siglip.vision_to_hf(cfg.vision),
        "text_config": family.config_to_hf(text_experiment(cfg.decoder)),
        "hidden_size": cfg.decoder.width,
        "projection_dim": cfg.decoder.width,
        "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
    }


def param_table(cfg: Experiment) -> list[Row]:
    return [
        *siglip.vision_rows(cfg.vision, TOWER, "vision/"),
        *llama.dense_rows(f"{PROJECTOR}linear", "projector/linear", "D E -> E D", True),
        *llama.decoder_rows(cfg.decoder, cfg.fusion, TEXT, HEAD),
    ]


PALIGEMMA = Family(
    "paligemma",
    config_from_hf,
    config_to_hf,
    param_table,
    RENAMES,
    gemma.TOLERANCE,
    image_token=256000,
    processor=HfProcessor("PaliGemmaProcessor", has_prompt_format=True, counts_image_tokens=True),
    module_names=MODULE_NAMES,
)
