"""The experiment's configuration: its dataclasses, their checks, and files that hold them."""

from vlm_jax.config.data import Data, Source
from vlm_jax.config.devices import Distributed, Mesh, factorizations
from vlm_jax.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    RunError,
    UserError,
    naming_source,
)
from vlm_jax.config.evaluation import Eval
from vlm_jax.config.experiment import Experiment
from vlm_jax.config.model import (
    CHANNELS,
    FUSION_STYLES,
    PROJECTORS,
    Contrastive,
    Decoder,
    Fusion,
    FusionStyle,
    Lora,
    Model,
    PatchRope,
    Projector,
    ProjectorSpec,
    Rope,
    Transformer,
    Vision,
)
from vlm_jax.config.training import LrMult, Optim, Train

__all__ = [
    "CHANNELS",
    "CheckpointError",
    "ConfigError",
    "Contrastive",
    "Data",
    "DataError",
    "Decoder",
    "Distributed",
    "Eval",
    "Experiment",
    "FUSION_STYLES",
    "Fusion",
    "FusionStyle",
    "Lora",
    "Mesh",
    "Model",
    "NonFiniteError",
    "Optim",
    "PROJECTORS",
    "PatchRope",
    "Projector",
    "ProjectorSpec",
    "LrMult",
    "Rope",
    "RunError",
    "Source",
    "Train",
    "Transformer",
    "UserError",
    "Vision",
    "factorizations",
    "naming_source",
]
