"""LLaVA 1.5: CLIP, SigLIP or Pixtral, an MLP projector, and Llama, Mistral or Qwen."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from vlm_jax.config import (
    CheckpointError,
    Decoder,
    Experiment,
    Fusion,
    Projector,
    Vision,
)
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.encoders import clip, pixtral, siglip
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    text_experiment,
)
from vlm_jax.hub.families.table import Row

TOWERS = {"clip_vision_model": clip, "siglip_vision_model": siglip, "pixtral": pixtral}
TEXTS = {
    family.model_type: family for family in (llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3)
}
TOWER, PROJECTOR, TEXT = (
    "vision_tower.vision_model.",
    "multi_modal_projector.",
    "language_model.model.",
)
BARE_TOWER = "vision_tower."  # of Pixtral's encoder
HEAD = "language_model.lm_head.weight"


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    bias = get_or(config, "multimodal_projector_bias", True)
    activation = lookup(config, "projector_hidden_act", ACTIVATIONS, "gelu")
    return Experiment(
        vision=tower_from_hf(config),
        projector=Projector(kind="mlp", activation=activation, bias=bias),
        fusion=Fusion(kind="unified"),
        decoder=text_from_hf(config, names, TEXTS, "llama"),
    )


def tower_from_hf(config: Json) -> Vision:
    """Reads the encoder. LLaVA uses patch tokens, so the pooled vector is dropped."""
    tower_config = get_or(config, "vision_config", {})
    vision = choose_nested(
        "vision_config", tower_config, TOWERS, "clip_vision_model"
    ).vision_from_hf(tower_config)
    layers = get_or(config, "vision_feature_layer", -2)
    layers = tuple(layers) if isinstance(layers, list | tuple) else (layers,)
    if not all(type(layer) is int for layer in layers):
        raise CheckpointError(
            f"config.json: vision_feature_layer {layers} must be an integer or a list of integers."
        )
    if not all(-vision.depth - 1 <= layer <= vision.depth for layer in layers):
        raise CheckpointError(
            f"config.json: vision_feature_layer {layers} is outside the encoder's "
            f"{vision.depth + 1} hidden states."
        )
    keeps_all = lookup(
        config, "vision_feature_select_strategy", {"default": False, "full": True}, "default"
    )
    if not vision.class_token and not keeps_all:
        raise CheckpointError(
            "config.json: vision_feature_select_strategy 'default' drops the class token, but the "
            "encoder has none: only 'full' is supported."
        )
    return replace(
        vision,
        pool="none" if vision.pool == "class" else vision.pool,
        feature_layers=layers,
        keep_class_token=vision.class_token and keeps_all,
    )


def text_from_hf(
    config: Json, names: Collection[str], families: Mapping[str, Family], default: str
) -> Decoder:
    """Reads `text_config` with its family, whose tensor names have no prefix."""
    text = get_or(config, "text_config", {})
    family = choose_nested("text_config", text, families, default)
    # transformers 4 uses the key of text_config, 5 this one.
    if config.get("tie_word_embeddings"):
        text = text | {"tie_word_embeddings": True}
    return family.config_from_hf(
        text, {name.removeprefix("language_model.") for name in names}
    ).decoder


def choose_nested(key: str, config: Json, choices: Mapping, default: str):
    """Returns the choice that the `model_type` of a nested config names."""
    name = f"{key}.model_type"
    return lookup({name: config.get("model_type")}, name, choices, default)


def config_to_hf(cfg: Experiment) -> Json:
    vision, layers = cfg.vision, cfg.vision.feature_layers
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": vision_family(vision).vision_to_hf(vision),
        "text_config": text_family(cfg.decoder).config_to_hf(text_experiment(cfg.decoder)),
        "vision_feature_layer": list(layers) if len(layers) > 1 else (*layers, -1)[0],
        "vision_feature_select_strategy": "default"
        if vision.class_token and not vision.keep_class_token
        else "full",
        "projector_hidden_act": HUB_ACTIVATIONS[cfg.projector.activation],
        "multimodal_projector_bias": cfg.projector.bias,
        "image_seq_length": cfg.image_tokens,
        "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
    }


def vision_family(vision: Vision):
    """Returns the module of the encoder's family."""
    if vision.is_native:
        return pixtral
    return clip if vision.class_token else siglip


def text_family(decoder: Decoder) -> Family:
    """Returns the family that can express the decoder; Mistral without a window is Llama."""
    if decoder.qk_norm == "head":
        return llama.QWEN3
    if decoder.qkv_bias and not decoder.out_bias:
        return llama.QWEN2
    return llama.MISTRAL if decoder.sliding_layers else llama.LLAMA


def param_table(cfg: Experiment) -> list[Row]:
    bias = cfg.projector.bias
    tower = BARE_TOWER if cfg.vision.is_native else TOWER
    return [
        *vision_family(cfg.vision).vision_rows(cfg.vision, tower, "vision/"),
        *llama.dense_rows(f"{PROJECTOR}linear_1", "projector/linear_1", "D E -> E D", bias),
        *llama.dense_rows(f"{PROJECTOR}linear_2", "projector/linear_2", "F D -> D F", bias),
        *llama.decoder_rows(cfg.decoder, cfg.fusion, TEXT, HEAD),
    ]


RENAMES = (  # module names of transformers 5, in memory and in part in its files
    (r"^model\.language_model\.", TEXT),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
    (r"^vision_tower\.(?!vision_model\.|patch_conv\.|ln_pre\.|transformer\.)", TOWER),
)
MODULE_NAMES = (  # the inverse
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^(multi_modal_projector|vision_embed_tokens|vision_tower)\.", r"model.\1."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
LLAVA = Family(
    "llava",
    config_from_hf,
    config_to_hf,
    param_table,
    RENAMES,
    image_token=32000,
    processor=HfProcessor("LlavaProcessor", counts_patches=True),
    module_names=MODULE_NAMES,
)
