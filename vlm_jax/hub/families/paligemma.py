"""PaliGemma 1 and 2: SigLIP's tokens go through one product into the sequence of Gemma or Gemma 2.

The image and the prompt behind it are a prefix that sees all of itself.
"""

from collections.abc import Collection

from vlm_jax.config import Experiment, Fusion, Projector
from vlm_jax.hub.families import gemma, llama, siglip
from vlm_jax.hub.families.family import (
    Family,
    Json,
    get,
    text_experiment,
)
from vlm_jax.hub.families.llava import (
    HEAD,
    PROJECTOR,
    RENAMES,
    TEXT,
    TOWER,
    choose_nested,
    read_text,
)
from vlm_jax.hub.families.table import Row

TOWERS = {"siglip_vision_model": siglip}
TEXTS = {family.model_type: family for family in (gemma.GEMMA, gemma.GEMMA2)}


def read(config: Json, names: Collection[str]) -> Experiment:
    tower = get(config, "vision_config", {})
    choose_nested("vision_config", tower, TOWERS, "siglip_vision_model")
    causal = {"use_bidirectional_attention": False}  # but for the prefix, of which the batch knows
    text = get(config, "text_config", {}) | causal
    return Experiment(
        vision=siglip.read_vision(tower),
        projector=Projector(kind="linear"),
        fusion=Fusion(kind="unified", prefix="bidirectional"),
        decoder=read_text(config | {"text_config": text}, names, TEXTS, "gemma"),
    )


def write(cfg: Experiment) -> Json:
    family = gemma.GEMMA2 if cfg.decoder.norm_position == "sandwich" else gemma.GEMMA
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "vision_config": siglip.write_vision(cfg.vision),
        "text_config": family.write(text_experiment(cfg.decoder)),
        "hidden_size": cfg.decoder.width,
        "projection_dim": cfg.decoder.width,
        "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
    }


def rows(cfg: Experiment) -> list[Row]:
    return [
        *siglip.vision_rows(cfg.vision, TOWER, "vision/"),
        *llama.dense_rows(f"{PROJECTOR}linear", "projector/linear", "D E -> E D", True),
        *gemma.decoder_rows(cfg.decoder, cfg.fusion, TEXT, HEAD),
    ]


PALIGEMMA = Family("paligemma", read, write, rows, RENAMES, gemma.TOLERANCE, image_token=256000)
