"""Vision-encoder-decoder: a ViT, every token of which GPT-2 or TrOCR's decoder reads in each of its blocks."""

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
from vlm_jax.hub.families import gpt2, trocr, vit
from vlm_jax.hub.families.family import (
    Family,
    Json,
    choose,
    get,
    refuse,
)
from vlm_jax.hub.families.llama import dense_rows
from vlm_jax.hub.families.table import Row


class TextSide(NamedTuple):
    """A decoder's part of config.json and of the table, and where its tensors stand below `decoder.`."""

    read: Callable[[Json, Collection[str], str], Decoder]
    write: Callable[[Decoder], Json]
    rows: Callable[[Decoder, Fusion, str, str], list[Row]]
    prefix: str
    head: str


DECODERS = {
    "gpt2": TextSide(
        gpt2.read_decoder, gpt2.write_decoder, gpt2.decoder_rows, "transformer.", "lm_head.weight"
    ),
    "trocr": TextSide(
        trocr.read_decoder, trocr.write_decoder, trocr.decoder_rows, "model.decoder.", trocr.HEAD
    ),
}


def kind_of(decoder: Decoder) -> str:
    return "trocr" if decoder.norm_position == "post" else "gpt2"


def read(config: Json, names: Collection[str]) -> Experiment:
    encoder, text = get(config, "encoder", {}), get(config, "decoder", {})
    refuse(encoder, "model_type", "vit")
    side = choose(text, "model_type", DECODERS, "")
    vision = vit.read_vision(encoder, [name.removeprefix("encoder.") for name in names])
    head = f"decoder.{side.head}"
    decoder = side.read(text, names, head)
    is_projected = vision.width != decoder.width and text.get("cross_attention_hidden_size") is None
    return Experiment(
        vision=replace(vision, keep_class_token=True),
        projector=Projector("linear" if is_projected else "none"),
        fusion=Fusion("encoder_decoder", qk_norm=False),
        decoder=decoder,
    )


def write(cfg: Experiment) -> Json:
    kind = kind_of(cfg.decoder)
    reads_as_it_is = cfg.projector.kind == "none" and cfg.vision.width != cfg.decoder.width
    if reads_as_it_is and kind == "gpt2":
        raise CheckpointError(
            "GPT-2 reads image tokens of its own width alone: choose projector.kind linear."
        )
    return {
        "architectures": ["VisionEncoderDecoderModel"],
        "model_type": "vision-encoder-decoder",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,  # of encoder and decoder; the decoder's own key is about its head
        "encoder": vit.write_vision(cfg.vision),
        "decoder": {
            "model_type": kind,
            "is_decoder": True,
            "add_cross_attention": True,
            "cross_attention_hidden_size": cfg.vision.width if reads_as_it_is else None,
            **DECODERS[kind].write(cfg.decoder),
        },
    }


def rows(cfg: Experiment) -> list[Row]:
    side = DECODERS[kind_of(cfg.decoder)]
    found = vit.vision_rows(cfg.vision, "encoder.", "vision/")
    if cfg.projector.kind == "linear":
        found += dense_rows("enc_to_dec_proj", "projector/linear", "D E -> E D", True)
    return found + side.rows(
        cfg.decoder, cfg.fusion, f"decoder.{side.prefix}", f"decoder.{side.head}"
    )


RENAMES = (  # the modules of transformers 5 in memory
    (r"^encoder\.layers\.", "encoder.encoder.layer."),
    *vit.MODULE_RENAMES,
)
ENCODER_DECODER = Family("vision-encoder-decoder", read, write, rows, RENAMES)
