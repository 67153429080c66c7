"""Settings of whole models."""

from dataclasses import dataclass, field
from typing import Literal

from vlm_jax.config.model.decoder import Decoder
from vlm_jax.config.model.fusion import Fusion
from vlm_jax.config.model.lora import Lora
from vlm_jax.config.model.projector import Projector
from vlm_jax.config.model.vision import Vision

# Sections of a model that may start from a checkpoint of their own.
PRETRAINED_PARTS = ("vision", "projector", "decoder")


@dataclass(frozen=True)
class Model:
    """Settings of a vision-language model: the part of an experiment that `nn/` takes."""

    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    fusion: Fusion = field(default_factory=Fusion)
    decoder: Decoder = field(default_factory=Decoder)
    lora: Lora = Lora()

    @property
    def image_tokens(self) -> int:
        """M: number of tokens of one view of an image after the projector."""
        return self.projector.num_tokens(self.vision)

    @property
    def has_tokens_by_size(self) -> bool:
        """True if an image has a token for each of its squares of patches, M at most."""
        return self.vision.is_native and self.projector.spec.tokens != "queries"


@dataclass(frozen=True)
class Contrastive:
    """Settings of an image and a text encoder that are compared by a dot product (CLIP, SigLIP).

    `text` is a decoder without an output head.
    """

    vision: Vision
    text: Decoder
    embed_width: int = 512  # W: dimension of the embeddings that are compared
    #: project the pooled image to embed_width; otherwise it has that width already
    image_projection: bool = True
    text_projection_bias: bool = False  # bias of the projection of texts to embed_width
    causal: bool = True  # causal attention in the text encoder
    #: token whose hidden state represents the text; last: may be padding (SigLIP)
    text_pool: Literal["largest_id", "first_eos", "last"] = "largest_id"
    eos_id: int = 2  # first_eos: id of the end of text
    logit_bias: bool = False  # add a learned bias to the logits (SigLIP)
