"""Qwen3-VL: Qwen2-VL's encoder with learned positions and DeepStack, and Qwen3.

Bai et al. 2025 (Qwen3-VL) and Meng et al. 2024 (DeepStack, section 3.2). Images only.
"""

import math
from collections.abc import Collection
from dataclasses import replace

from vlm_jax.config import CheckpointError, Experiment, Fusion, Vision
from vlm_jax.hub.families.decoders import llama
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.family import (
    Family,
    HfProcessor,
    Json,
    get_or,
    positive_int,
    text_experiment,
)
from vlm_jax.hub.families.multimodal.qwen2_vl import (
    SHARED_DEFAULTS,
    native_projector,
    shared_vision,
    shared_vision_to_hf,
    vision_rows,
    with_sections,
)
from vlm_jax.hub.families.table import Row, row

TOWER, TEXT = "model.visual.", "model.language_model."
VISION_DEFAULTS = {
    "depth": 27,
    "patch_size": 16,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "hidden_act": "gelu_pytorch_tanh",
    "num_position_embeddings": 48**2,
    "deepstack_visual_indexes": [8, 16, 24],
}
TEXT_DEFAULTS = {"max_position_embeddings": 128000, "rope_theta": 500_000.0}
SECTIONS = [24, 20, 20]
MLP = {"mlp/up": "mlp.linear_fc1", "mlp/down": "mlp.linear_fc2"}


def vision_from_hf(config: Json) -> Vision:
    """Reads the encoder.

    Raises:
      CheckpointError: its table of positions is not a square.
    """
    config = SHARED_DEFAULTS | VISION_DEFAULTS | llama.drop_nulls(config)
    vision = shared_vision(config, "hidden_size")
    positions = positive_int(config, "num_position_embeddings")
    if math.isqrt(positions) ** 2 != positions:
        raise CheckpointError(
            f"config.json: num_position_embeddings is {positions}, but must be a square number."
        )
    return replace(
        vision,
        mlp_width=positive_int(config, "intermediate_size"),
        patch_bias=True,
        positions="learned",
        resample_positions="corners",
        image_size_px=math.isqrt(positions) * vision.patch_size_px,
        deepstack_layers=tuple(layer + 1 for layer in config["deepstack_visual_indexes"]),
    )


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    vision = vision_from_hf(get_or(config, "vision_config", {}))
    text = TEXT_DEFAULTS | llama.drop_nulls(get_or(config, "text_config", {}))
    tied = get_or(config, "tie_word_embeddings", get_or(text, "tie_word_embeddings", False))
    text["tie_word_embeddings"] = tied
    decoder = llama.qwen3_from_hf(text, names).decoder
    return Experiment(
        vision=vision,
        projector=native_projector(vision),
        fusion=Fusion("unified"),
        decoder=with_sections(decoder, text, SECTIONS, interleaved=True),
    )


def config_to_hf(cfg: Experiment) -> Json:
    vision, text = cfg.vision, llama.qwen3_to_hf(text_experiment(cfg.decoder))
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text | {"model_type": "qwen3_vl_text"},
        "vision_config": shared_vision_to_hf(vision)
        | {
            "model_type": "qwen3_vl",
            "hidden_size": vision.width,
            "out_hidden_size": cfg.decoder.width,
            "intermediate_size": vision.mlp_width,
            "num_position_embeddings": math.prod(vision.grid),
            "deepstack_visual_indexes": [layer - 1 for layer in vision.deepstack_layers],
        },
        "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
    }


def param_table(cfg: Experiment) -> list[Row]:
    patches = "vision/patch_embed"
    rows = [
        *vision_rows(cfg.vision, TOWER, MLP),
        row(f"{TOWER}patch_embed.proj.bias", f"{patches}/projection/bias"),
        row(f"{TOWER}pos_embed.weight", f"{patches}/positions"),
        *norm_rows(f"{TOWER}merger.norm", "vision/final_norm"),
        *_merger_rows(f"{TOWER}merger", "projector/mlp"),
        *llama.decoder_rows(cfg.decoder, cfg.fusion, TEXT),
    ]
    for i in range(len(cfg.vision.deepstack_layers)):
        hf, param = f"{TOWER}deepstack_merger_list.{i}", f"projector/deepstack_{i}"
        rows += norm_rows(f"{hf}.norm", f"{param}/norm")
        rows += _merger_rows(hf, f"{param}/mlp")
    return rows


def _merger_rows(hf: str, param: str) -> list[Row]:
    return [
        *llama.dense_rows(f"{hf}.linear_fc1", f"{param}/linear_1", "D E -> E D", True),
        *llama.dense_rows(f"{hf}.linear_fc2", f"{param}/linear_2", "F D -> D F", True),
    ]


QWEN3_VL = Family(
    "qwen3_vl",
    config_from_hf,
    config_to_hf,
    param_table,
    # Files of a model without a head.
    ((r"^(visual|language_model)\.", r"model.\1."),),
    image_token=151655,
    processor=HfProcessor("Qwen3VLProcessor", image_processor="Qwen2VLImageProcessor"),
)
