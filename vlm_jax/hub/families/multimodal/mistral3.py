"""Mistral 3 (Mistral Small 3.1): Pixtral's encoder, merged squares of patches, and Mistral.

The norm of its projector is the norm after the encoder's last block. Source: transformers,
models/mistral3/modeling_mistral3.py.
"""

from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import CheckpointError, Experiment, Fusion, Projector
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.encoders import pixtral
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    positive_int,
    reject_unless,
    text_experiment,
)
from vlm_jax.hub.families.multimodal import llava
from vlm_jax.hub.families.table import Row, row

PROJECTOR = llava.PROJECTOR
VISION_DEFAULTS = {"patch_size": 14, "image_size": 1540}  # where vision_config is missing


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    """Reads config.json.

    Raises:
      CheckpointError: a setting is not supported.
    """
    reject_unless(config, "vision_feature_layer", -1, [-1], None)
    tower = get_or(config, "vision_config", VISION_DEFAULTS)
    llava.choose_nested("vision_config", tower, {"pixtral": pixtral}, "pixtral")
    side = positive_int(config, "spatial_merge_size", 2)
    vision = replace(pixtral.vision_from_hf(tower), final_norm="tokens", patch_square=side)
    tied = {"tie_word_embeddings": get_or(config, "tie_word_embeddings", True)}
    decoder = llava.text_from_hf(config | tied, names, llava.TEXTS, "mistral")
    if decoder.norm_eps != vision.norm_eps:
        raise CheckpointError(
            f"config.json: rms_norm_eps {decoder.norm_eps} of text_config is also used by the "
            f"projector's norm, where only {vision.norm_eps} is supported."
        )
    return Experiment(
        vision=vision,
        projector=Projector(
            "pixel_shuffle",
            factor=side,
            merge_linear=True,
            projection="mlp",
            activation=lookup(config, "projector_hidden_act", ACTIVATIONS, "gelu"),
            bias=get_or(config, "multimodal_projector_bias", False),
        ),
        fusion=Fusion("unified"),
        decoder=decoder,
    )


def config_to_hf(cfg: Experiment) -> Json:
    text = llava.text_family(cfg.decoder).config_to_hf(text_experiment(cfg.decoder))
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "vision_config": pixtral.vision_to_hf(cfg.vision),
        "text_config": text,
        "vision_feature_layer": -1,
        "spatial_merge_size": cfg.projector.factor,
        "projector_hidden_act": HUB_ACTIVATIONS[cfg.projector.activation],
        "multimodal_projector_bias": cfg.projector.bias,
        "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
    }


def param_table(cfg: Experiment) -> list[Row]:
    bias, side = cfg.projector.bias, cfg.projector.factor
    mlp = "projector/mlp"
    return [
        *pixtral.vision_rows(cfg.vision, llava.BARE_TOWER, "vision/"),
        llama.norm_row(f"{PROJECTOR}norm", "vision/final_norm"),
        # The channel is the first axis of a merged token there, and the last here.
        row(
            f"{PROJECTOR}patch_merger.merging_layer.weight",
            "projector/merge/kernel",
            "D (E f g) -> (f g E) D",
            f=side,
            g=side,
        ),
        *llama.dense_rows(f"{PROJECTOR}linear_1", f"{mlp}/linear_1", "D E -> E D", bias),
        *llama.dense_rows(f"{PROJECTOR}linear_2", f"{mlp}/linear_2", "F D -> D F", bias),
        *llama.decoder_rows(cfg.decoder, cfg.fusion, llava.TEXT, llava.HEAD),
    ]


MISTRAL3 = Family(
    "mistral3",
    config_from_hf,
    config_to_hf,
    param_table,
    llava.RENAMES,
    image_token=10,
    processor=HfProcessor(
        "PixtralProcessor",
        needs_placeholder=True,
        keeps_image_size=True,
        image_processor="PixtralImageProcessor",
    ),
    module_names=llava.MODULE_NAMES,
)
