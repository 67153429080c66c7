"""Vision-encoder-decoder: a ViT, and GPT-2 or TrOCR's decoder with cross-attention."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

from vlm_jax.config import (
    CheckpointError,
    Decoder,
    Experiment,
    Fusion,
    Projector,
)
from vlm_jax.hub.families.decoders import gpt2, trocr
from vlm_jax.hub.families.decoders.llama import dense_rows
from vlm_jax.hub.families.encoders import vit
from vlm_jax.hub.families.family import (
    Family,
    HfProcessor,
    Json,
    get_or,
    lookup,
    reject_unless,
)
from vlm_jax.hub.families.table import Row


class TextSide(NamedTuple):
    """Config mapping and rows of one kind of decoder, and its tensor names below `decoder.`."""

    decoder_from_hf: Callable[[Json, Collection[str], str], Decoder]
    decoder_to_hf: Callable[[Decoder], Json]
    decoder_rows: Callable[[Decoder, Fusion, str, str], list[Row]]
    prefix: str
    head: str


DECODERS = {
    "gpt2": TextSide(
        gpt2.decoder_from_hf,
        gpt2.decoder_to_hf,
        gpt2.decoder_rows,
        "transformer.",
        "lm_head.weight",
    ),
    "trocr": TextSide(
        trocr.decoder_from_hf, trocr.decoder_to_hf, trocr.decoder_rows, "model.decoder.", trocr.HEAD
    ),
}


def decoder_type(decoder: Decoder) -> str:
    return "trocr" if decoder.norm_position == "post" else "gpt2"


def config_from_hf(config: Json, names: Collection[str]) -> Experiment:
    encoder, text = get_or(config, "encoder", {}), get_or(config, "decoder", {})
    reject_unless(encoder, "model_type", "vit")
    side = lookup(text, "model_type", DECODERS, "")
    vision = vit.vision_from_hf(encoder, [name.removeprefix("encoder.") for name in names])
    head = f"decoder.{side.head}"
    decoder = side.decoder_from_hf(text, names, head)
    is_projected = vision.width != decoder.width and text.get("cross_attention_hidden_size") is None
    return Experiment(
        vision=replace(vision, keep_class_token=True),
        projector=Projector("linear" if is_projected else "none"),
        fusion=Fusion("encoder_decoder", qk_norm=False),
        decoder=decoder,
    )


def config_to_hf(cfg: Experiment) -> Json:
    kind = decoder_type(cfg.decoder)
    is_unprojected = cfg.projector.kind == "none" and cfg.vision.width != cfg.decoder.width
    if is_unprojected and kind == "gpt2":
        raise CheckpointError(
            "GPT-2 needs image tokens of its own width: set projector.kind to linear."
        )
    return {
        "architectures": ["VisionEncoderDecoderModel"],
        "model_type": "vision-encoder-decoder",
        "is_encoder_decoder": True,
        # Ties encoder and decoder; the decoder's own key ties its head.
        "tie_word_embeddings": False,
        "encoder": vit.vision_to_hf(cfg.vision),
        "decoder": {
            "model_type": kind,
            "is_decoder": True,
            "add_cross_attention": True,
            "cross_attention_hidden_size": cfg.vision.width if is_unprojected else None,
            **DECODERS[kind].decoder_to_hf(cfg.decoder),
        },
    }


def param_table(cfg: Experiment) -> list[Row]:
    side = DECODERS[decoder_type(cfg.decoder)]
    rows = vit.vision_rows(cfg.vision, "encoder.", "vision/")
    if cfg.projector.kind == "linear":
        rows += dense_rows("enc_to_dec_proj", "projector/linear", "D E -> E D", True)
    return rows + side.decoder_rows(
        cfg.decoder, cfg.fusion, f"decoder.{side.prefix}", f"decoder.{side.head}"
    )


RENAMES = (  # module names of transformers 5
    (r"^encoder\.layers\.", "encoder.encoder.layer."),
    *vit.MODULE_RENAMES,
)
MODULE_NAMES = (  # the inverse
    (r"^encoder\.encoder\.layer\.", "encoder.layers."),
    *vit.MODULE_NAMES,
)
ENCODER_DECODER = Family(
    "vision-encoder-decoder",
    config_from_hf,
    config_to_hf,
    param_table,
    RENAMES,
    processor=HfProcessor("TrOCRProcessor", needs_bos=True),
    module_names=MODULE_NAMES,
)
