"""Idefics3 and SmolVLM: SigLIP, pixel shuffle and a linear projection, and Llama.

Laurençon et al. 2024 (Building and better understanding vision-language models, section 3) and
Marafioti et al. 2025 (SmolVLM). The encoder takes whole squares, as the processors make them.
"""

from collections.abc import Collection

from vlm_jax.config import CheckpointError, Experiment, Fusion, Projector, Vision
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.encoders import siglip
from vlm_jax.hub.families.family import (
    Family,
    HfProcessor,
    Json,
    get_or,
    positive_int,
    text_experiment,
)
from vlm_jax.hub.families.multimodal.llava import TEXTS, text_family, text_from_hf
from vlm_jax.hub.families.table import Row

TOWER, PROJECTOR, TEXT = (
    "model.vision_model.",
    "model.connector.modality_projection.proj",
    "model.text_model.",
)
HEAD = "lm_head.weight"
VISION_DEFAULTS = {  # of Idefics3VisionConfig
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "vision_use_head": False,
}
TEXT_DEFAULT = {"model_type": "llama", "rms_norm_eps": 1e-5}


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    tower = VISION_DEFAULTS | llama.drop_nulls(get_or(config, "vision_config", {}))
    vision = siglip.vision_from_hf(tower)
    factor = positive_int(config, "scale_factor", 2)
    check_factor(vision, factor, f"scale_factor {factor}")
    text = get_or(config, "text_config", TEXT_DEFAULT)
    return Experiment(
        vision=vision,
        projector=Projector("pixel_shuffle", factor=factor, bias=False),
        fusion=Fusion("unified"),
        decoder=text_from_hf(config | {"text_config": text}, names, TEXTS, "llama"),
    )


def check_factor(vision: Vision, factor: int, key: str) -> None:
    """Raises CheckpointError if the grid of patches is not a multiple of a factor."""
    rows, columns = vision.grid
    if rows % factor or columns % factor:
        raise CheckpointError(
            f"config.json: {key} is not supported: it does not divide the {rows} x {columns} "
            "patches of an image."
        )


def param_table(cfg: Experiment) -> list[Row]:
    return [
        *siglip.vision_rows(cfg.vision, TOWER, "vision/"),
        *llama.dense_rows(PROJECTOR, "projector/linear", "D E -> E D", cfg.projector.bias),
        *llama.decoder_rows(cfg.decoder, cfg.fusion, TEXT, HEAD),
    ]


def family(model_type: str, name: str) -> Family:
    """Builds the family with the classes of transformers that begin with `name`."""

    def config_to_hf(cfg: Experiment) -> Json:
        vision = siglip.vision_to_hf(cfg.vision) | {"model_type": f"{model_type}_vision"}
        del vision["vision_use_head"]
        return {
            "architectures": [f"{name}ForConditionalGeneration"],
            "model_type": model_type,
            "vision_config": vision,
            "text_config": text_family(cfg.decoder).config_to_hf(text_experiment(cfg.decoder)),
            "scale_factor": cfg.projector.factor,
            "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
        }

    return Family(
        model_type,
        config_from_hf,
        config_to_hf,
        param_table,
        llama.RENAMES,
        image_token=128257,
        processor=HfProcessor(
            f"{name}Processor",
            resize="squash",
            has_prompt_format=True,
            counts_image_tokens=True,
            token_count_key="image_seq_len",
            image_processor=f"{name}ImageProcessor",
        ),
    )


IDEFICS3 = family("idefics3", "Idefics3")
SMOLVLM = family("smolvlm", "SmolVLM")
