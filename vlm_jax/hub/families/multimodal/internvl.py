"""InternVL 2.5 and 3 in transformers' layout: InternViT, pixel shuffle and an MLP, and Qwen or
Llama (Chen et al. 2024, How far are we to GPT-4V?, section 3.1)."""

from collections.abc import Collection

from vlm_jax.config import CheckpointError, Experiment, Fusion, Projector
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.encoders import internvl_vision
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    positive_number,
    reject_unless,
    text_experiment,
)
from vlm_jax.hub.families.multimodal.idefics3 import check_factor
from vlm_jax.hub.families.multimodal.llava import (
    HEAD,
    PROJECTOR,
    TEXT,
    TEXTS,
    text_family,
    text_from_hf,
)
from vlm_jax.hub.families.table import Row

TOWER, RATIO = "vision_tower.", "downsample_ratio"
PROJECTOR_EPS = 1e-5  # of the projector's LayerNorm, in no file


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    reject_unless(config, "vision_feature_layer", -1)
    reject_unless(config, "vision_feature_select_strategy", "default")
    vision = internvl_vision.vision_from_hf(get_or(config, "vision_config", {}))
    ratio = positive_number(config, RATIO, 0.5)
    factor = round(1 / ratio)
    if factor < 1 or 1 / factor != ratio:
        raise CheckpointError(
            f"config.json: {RATIO} is {ratio}, but must be 1 divided by a whole number."
        )
    check_factor(vision, factor, f"{RATIO} {ratio}")
    tied = bool(get_or(config, "tie_word_embeddings", True))
    return Experiment(
        vision=vision,
        projector=Projector(
            "pixel_shuffle",
            factor=factor,
            norm="layernorm",
            norm_eps=PROJECTOR_EPS,
            projection="mlp",
            activation=lookup(config, "projector_hidden_act", ACTIVATIONS, "gelu"),
        ),
        fusion=Fusion("unified"),
        decoder=text_from_hf(config | {"tie_word_embeddings": tied}, names, TEXTS, "qwen2"),
    )


def config_to_hf(cfg: Experiment) -> Json:
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": internvl_vision.vision_to_hf(cfg.vision),
        "text_config": text_family(cfg.decoder).config_to_hf(text_experiment(cfg.decoder)),
        RATIO: 1 / cfg.projector.factor,
        "projector_hidden_act": HUB_ACTIVATIONS[cfg.projector.activation],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "image_seq_length": cfg.image_tokens,
        "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
    }


def param_table(cfg: Experiment) -> list[Row]:
    mlp, bias = "projector/mlp", cfg.projector.bias
    return [
        *internvl_vision.vision_rows(cfg.vision, TOWER, "vision/"),
        *norm_rows(f"{PROJECTOR}layer_norm", "projector/norm"),
        *llama.dense_rows(f"{PROJECTOR}linear_1", f"{mlp}/linear_1", "D E -> E D", bias),
        *llama.dense_rows(f"{PROJECTOR}linear_2", f"{mlp}/linear_2", "F D -> D F", bias),
        *llama.decoder_rows(cfg.decoder, cfg.fusion, TEXT, HEAD),
    ]


RENAMES = (  # module names of transformers 5
    (r"^model\.language_model\.", TEXT),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
MODULE_NAMES = (  # the inverse
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
INTERNVL = Family(
    "internvl",
    config_from_hf,
    config_to_hf,
    param_table,
    RENAMES,
    image_token=151667,
    processor=HfProcessor(
        "InternVLProcessor",
        resize="squash",
        has_prompt_format=True,
        counts_image_tokens=True,
        image_processor="GotOcr2ImageProcessor",
    ),
    module_names=MODULE_NAMES,
)
