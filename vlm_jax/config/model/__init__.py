"""Settings of the model's parts; every public model family is a choice of them, not a class."""

from vlm_jax.config.model.decoder import Decoder, Rope
from vlm_jax.config.model.fusion import FUSION_STYLES, Fusion, FusionStyle
from vlm_jax.config.model.lora import Lora, LoraTarget
from vlm_jax.config.model.models import PRETRAINED_PARTS, Contrastive, Model
from vlm_jax.config.model.projector import PROJECTORS, Projector, ProjectorSpec
from vlm_jax.config.model.transformer import Transformer
from vlm_jax.config.model.vision import CHANNELS, PatchRope, Vision

__all__ = [
    "CHANNELS",
    "Contrastive",
    "Decoder",
    "FUSION_STYLES",
    "Fusion",
    "FusionStyle",
    "Lora",
    "LoraTarget",
    "Model",
    "PRETRAINED_PARTS",
    "PROJECTORS",
    "PatchRope",
    "Projector",
    "ProjectorSpec",
    "Rope",
    "Transformer",
    "Vision",
]
