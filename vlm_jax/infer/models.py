"""Opens a training run or a public checkpoint as a model that writes text."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from vlm_jax.config import CheckpointError, Experiment
from vlm_jax.hub import load
from vlm_jax.hub.processor import HubProcessor
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.infer import run
from vlm_jax.infer.processor import Processor


@dataclass(frozen=True)
class TextModel:
    """A model that writes text. Its processor and its parameters are loaded when asked for.

    Parameters may be gigabytes, so that callers check what they can before they load them.
    """

    cfg: Experiment
    load_processor: Callable[[], Processor]
    load_params: Callable[[], dict]


def open_run(cfg: Experiment, step: str | int | None = None) -> TextModel:
    """Opens the training run in `cfg.workdir`; `step` is as of `vlm_jax.from_run`."""
    return TextModel(cfg, lambda: run.load_processor(cfg), lambda: run.load_params(cfg, step))


def open_checkpoint(
    folder: str | os.PathLike,
    intermediate_layers: str | None = None,
    adapter: str | os.PathLike | None = None,
) -> TextModel:
    """Opens the folder of a public checkpoint; takes the arguments of `load_checkpoint`.

    Raises:
      CheckpointError: the folder is damaged or not supported, or holds an encoder.
    """
    with open_tensors(folder) as tensors:
        checkpoint = load.inspect(folder, tensors, intermediate_layers, adapter)
    if not isinstance(checkpoint.cfg, Experiment):
        raise CheckpointError(f"{folder} is an encoder-only model and cannot generate text.")

    def load_params() -> dict:
        return load.load_params(folder, intermediate_layers=intermediate_layers, adapter=adapter)[1]

    return TextModel(checkpoint.cfg, lambda: HubProcessor.load(checkpoint), load_params)
