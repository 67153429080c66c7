"""The sections `optim` and `train`."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LrMult:
    """Learning rate of each part as a multiple of `optim.learning_rate`; 0 freezes the part."""

    vision: float = 1.0  # multiplier for the image encoder; 0 freezes it
    projector: float = 1.0  # multiplier for the projector; 0 freezes it
    decoder: float = 1.0  # multiplier for the decoder without cross-attention; 0 freezes it
    cross_attention: float = 1.0  # multiplier for cross-attention; 0 freezes it


@dataclass(frozen=True)
class Optim:
    #: adamw, muon (for kernels; AdamW for the rest), or another row of OPTIMIZERS in train/optim.py
    kind: str = "adamw"
    learning_rate: float = 1e-3  # peak learning rate, after warm-up
    lr_mult: LrMult = field(default_factory=LrMult)
    #: multiplier for the gates of cross-attention, on top of lr_mult.cross_attention: a gate is one
    #: number, which Adam moves by at most about the learning rate a step
    gate_lr_mult: float = 1.0
    warmup_steps: int = 100  # steps in which the learning rate rises from 0 to the peak
    final_lr_fraction: float = 0.0  # final learning rate as a fraction of the peak
    beta1: float = 0.9  # decay of the gradients' running mean
    beta2: float = 0.99  # AdamW: decay of the squared gradients' running mean
    weight_decay: float = 1e-4  # weight decay, for matrices only
    clip_norm: float = 1.0  # maximum global norm of the gradient


@dataclass(frozen=True)
class Train:
    steps: int = 1500  # number of optimizer steps, each on batch_size rows
    batch_size: int = 128  # number of rows in a global batch
    #: number of parts of a batch that are computed in sequence, with accumulated gradients
    microbatches: int = 1
    #: dtype of the forward and backward pass; trained parameters, the optimizer and the loss are
    #: float32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    #: dtype in which frozen parameters are stored; int8 and nf4 (QLoRA) quantize the kernels of
    #: blocks and of the projector, the rest is stored in compute_dtype; None: compute_dtype
    frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    #: nf4: store scales in 8 bits; False: in float32, as runs of older versions have them
    double_quantization: bool = True
    #: scored tokens per device whose logits are computed at once; None: all if they fit into 64
    #: MiB, else 512
    loss_chunk: int | None = None
    checkpoint_every_steps: int = 500  # steps between checkpoints
    keep_checkpoints: int = 3  # number of most recent checkpoints to keep
    #: also keep the N checkpoints with the best `best_metric`; a new best one is saved at once
    keep_best: int = 0
    #: score of a validation that ranks checkpoints: SPLIT/loss, SPLIT/METRIC such as
    #: val/exact_match, or SPLIT/loss/NAME for a source of data.mixture; None: the loss of the first
    #: split of eval.splits; without validation the mean training loss since the last checkpoint
    best_metric: str | None = None
    #: end the run after N validations in sequence without a better best_metric; None: never
    patience: int | None = None
    keep_every_steps: int | None = None  # also keep the checkpoint of every N-th step
    log_every_steps: int = 20  # steps between logged rows
    #: services that get the metrics, too: rows of TRACKERS in train/trackers.py, such as wandb
    trackers: tuple[str, ...] = ()
    #: "10:13": write a jax.profiler trace of steps 10 to 13 to the work folder; empty: none
    profile_steps: str = ""
    #: folder of compiled programs, reused by later runs; empty: off
    compilation_cache_dir: str = "~/.cache/vlm_jax/compiled"

    @property
    def quantizes_frozen(self) -> bool:
        """Frozen kernels are stored in 8 or 4 bits."""
        return self.frozen_dtype in ("int8", "nf4")

    @property
    def frozen_format(self) -> str:
        """Format of the frozen kernels, if they are quantized: a row of `FORMATS` in nn."""
        is_single = self.frozen_dtype == "nf4" and not self.double_quantization
        return "nf4_single" if is_single else self.frozen_dtype

    @property
    def frozen_float_dtype(self) -> str:
        """Dtype of the frozen parameters that are not quantized."""
        if self.frozen_dtype is None or self.quantizes_frozen:
            return self.compute_dtype
        return self.frozen_dtype

    @property
    def profiled(self) -> range:
        """The range of `profile_steps`, which must be valid."""
        if not self.profile_steps:
            return range(0)
        first, last = map(int, self.profile_steps.split(":"))
        return range(first, last + 1)
