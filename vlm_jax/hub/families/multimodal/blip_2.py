"""BLIP-2 (Li et al. 2023): EVA's ViT, a Q-Former, and OPT (transformers, models/blip_2)."""

from collections.abc import Collection

from vlm_jax.config import Experiment, Fusion, Projector
from vlm_jax.hub.families.decoders import opt, trocr
from vlm_jax.hub.families.decoders.gpt2 import norm_rows
from vlm_jax.hub.families.decoders.llama import HEAD, dense_rows
from vlm_jax.hub.families.encoders import blip_2_vision
from vlm_jax.hub.families.family import (
    ACTIVATIONS,
    HUB_ACTIVATIONS,
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    positive_int,
    positive_number,
    reject_unless,
    text_experiment,
)
from vlm_jax.hub.families.multimodal.llava import text_from_hf
from vlm_jax.hub.families.table import Row, row

TEXTS = {opt.OPT.model_type: opt.OPT}
TOWER, QFORMER, TEXT = "vision_model.", "qformer", "language_model."
ATTENTION = {"attention": "self", "crossattention": "cross"}


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    return Experiment(
        vision=blip_2_vision.vision_from_hf(get_or(config, "vision_config", {})),
        projector=projector_from_hf(config),
        fusion=Fusion("unified"),
        decoder=text_from_hf(
            config | {"text_config": {"model_type": "opt"} | get_or(config, "text_config", {})},
            names,
            TEXTS,
            "opt",
        ),
    )


def projector_from_hf(config: Json) -> Projector:
    qformer = get_or(config, "qformer_config", {})
    reject_unless(qformer, "use_qformer_text_input", False, None)
    width = positive_int(qformer, "hidden_size", 768)
    return Projector(
        "qformer",
        queries=positive_int(config, "num_query_tokens", 32),
        depth=positive_int(qformer, "num_hidden_layers", 12),
        width=width,
        heads=positive_int(qformer, "num_attention_heads", 12),
        block_mlp_width=positive_int(qformer, "intermediate_size", 3072),
        qk_norm=False,
        norm_eps=positive_number(qformer, "layer_norm_eps", 1e-12),
        cross_every=positive_int(qformer, "cross_attention_frequency", 2),
        block_activation=lookup(qformer, "hidden_act", ACTIVATIONS, "gelu"),
    )


def config_to_hf(cfg: Experiment) -> Json:
    projector = cfg.projector
    width = projector.block_width(cfg.vision, cfg.decoder.width)
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": projector.queries,
        "vision_config": blip_2_vision.vision_to_hf(cfg.vision),
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": width,
            "num_hidden_layers": projector.depth,
            "num_attention_heads": projector.heads,
            "intermediate_size": projector.block_mlp_width or 4 * width,
            "layer_norm_eps": projector.norm_eps,
            "cross_attention_frequency": projector.cross_every,
            "hidden_act": HUB_ACTIVATIONS[projector.block_activation],
            "encoder_hidden_size": cfg.vision.width,
        },
        "text_config": opt.config_to_hf(text_experiment(cfg.decoder)),
    }


def param_table(cfg: Experiment) -> list[Row]:
    return [
        *blip_2_vision.vision_rows(cfg.vision, TOWER, "vision/"),
        *qformer_rows(cfg.projector),
        *dense_rows("language_projection", "projector/linear", "D E -> E D", True),
        *trocr.decoder_rows(cfg.decoder, cfg.fusion, f"{TEXT}model.decoder.", head=f"{TEXT}{HEAD}"),
    ]


def qformer_rows(projector: Projector) -> list[Row]:
    """Rows of the Q-Former, whose blocks are not stacked."""
    rows = [
        row("query_tokens", "projector/queries", "1 Q D -> Q D"),
        *norm_rows(f"{QFORMER}.layernorm", "projector/norm"),
    ]
    for n in range(projector.depth):
        hf, param = f"{QFORMER}.encoder.layer.{n}", f"projector/block_{n}"
        for name, sublayer in ATTENTION.items():
            if sublayer == "self" or n % projector.cross_every == 0:
                rows += attention_rows(f"{hf}.{name}", f"{param}/{sublayer}")
        rows += dense_rows(f"{hf}.intermediate_query.dense", f"{param}/mlp/up", "F D -> D F", True)
        rows += dense_rows(f"{hf}.output_query.dense", f"{param}/mlp/down", "D F -> F D", True)
        rows += norm_rows(f"{hf}.output_query.LayerNorm", f"{param}/mlp_norm")
    return rows


def attention_rows(hf: str, param: str) -> list[Row]:
    """Rows of BERT's attention and the norm after it."""
    rows = []
    for name in ("query", "key", "value"):
        rows += dense_rows(f"{hf}.attention.{name}", f"{param}/{name}", "(N H) D -> D N H", True)
    return [
        *rows,
        *dense_rows(f"{hf}.output.dense", f"{param}/out", "D (N H) -> N H D", True),
        *norm_rows(f"{hf}.output.LayerNorm", f"{param}_norm"),
    ]


BLIP_2 = Family(
    "blip-2",
    config_from_hf,
    config_to_hf,
    param_table,
    image_token=50265,
    processor=HfProcessor(
        "Blip2Processor",
        adds_bos=False,
        resize="squash",
        has_prompt_format=True,
        counts_image_tokens=True,
        token_count_key="num_query_tokens",
        image_processor="BlipImageProcessor",
    ),
    counts_positions=True,
)
