"""Loads training runs for inference: parameters, tokenizer and processor."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from vlm_jax import axes
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.config import Mesh as MeshSizes
from vlm_jax.config.validate import validate
from vlm_jax.data import images as image_files
from vlm_jax.data import questions
from vlm_jax.data.forms.record import IMAGE_PLACEHOLDER
from vlm_jax.data.templates import has_system_turn
from vlm_jax.data.tiling import to_pixels
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.images.steps import ImageInput, ImageInputs, PixelScale, read, to_rows
from vlm_jax.hub.text.dialogue import content_parts
from vlm_jax.hub.text.prompts import ChatPrompt, Prompts, as_prompt_list, check_answers
from vlm_jax.hub.text.tokenizer import TextStream
from vlm_jax.nn import lora
from vlm_jax.nn.models import build_model
from vlm_jax.nn.vlm import VLM
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.structs import Batch, State
from vlm_jax.train import initial
from vlm_jax.train.step import abstract_state, cast_to_compute_dtype


@dataclass(frozen=True)
class RunProcessor:
    """Implements `infer.processor.Processor` for a training run."""

    cfg: Experiment
    tokenizer: Tokenizer

    def __call__(
        self,
        prompts: Prompts,
        images: ImageInputs = (),
        *,
        chat: bool = True,
        answers: Sequence[str] | None = None,
        pad_to_multiple_of: int = 1,
    ) -> Batch:
        """Encodes prompts and their images as a left-padded batch, to continue or to train on.

        An image that several prompts share is encoded once if their rows hold the same objects.

        Args:
          prompts: texts or conversations; a single one is a batch of one.
          images: one list for each prompt, or another nesting that `steps.to_rows` accepts.
          chat: must be True: a run formats every prompt like the questions of its training data.
          answers: one for each prompt. The batch then has them, and the `targets` and
            `loss_weights` that score them, and the answers in a conversation.
          pad_to_multiple_of: S is rounded up to a multiple of it, so that batches share a shape.

        Raises:
          ConfigError: chat is False, the images or answers do not match the prompts, or an image
            cannot be read.
        """
        if not chat:
            raise ConfigError("chat is False, but a run formats every prompt as its training data.")
        prompts = [self._as_chat(prompt) for prompt in as_prompt_list(prompts)]
        images = to_rows(images, [prompt.text for prompt in prompts], IMAGE_PLACEHOLDER)
        if answers is not None:
            check_answers(answers, prompts)
        row_keys = [tuple(map(id, row)) for row in images]
        distinct_rows = dict(zip(row_keys, images))
        pixels = [list(map(self._pixels, row)) for row in distinct_rows.values()]
        image_rows = [list(distinct_rows).index(key) for key in row_keys]
        return questions.prompt_batch(
            self.cfg,
            self.tokenizer,
            pixels,
            [prompt.turns[-1] for prompt in prompts],
            image_rows=image_rows,
            answers=answers,
            histories=[prompt.turns[:-1] for prompt in prompts],
            systems=[prompt.system for prompt in prompts],
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def tile_grids(self, images: Sequence[ImageInput]) -> None:
        """Returns None: `vision` determines the tiles of an image."""

    def _as_chat(self, prompt: str | ChatPrompt) -> ChatPrompt:
        """Returns a prompt in the form that the run's data has.

        Raises:
          ConfigError: the prompt has several turns, but the run was not trained on conversations.
        """
        if isinstance(prompt, str):
            return ChatPrompt((prompt,))
        if self.takes_conversations:
            return prompt
        if len(prompt.turns) > 1 or prompt.system is not None:
            raise ConfigError(
                "a prompt has several turns or a system turn, but the run was trained on single "
                f"questions (data.source {self.cfg.data.source})."
            )
        # Such a question is text alone: its image precedes it.
        parts = content_parts(prompt.turns[0])
        return ChatPrompt(("".join(part.get("text", "") for part in parts),))

    def _pixels(self, image: ImageInput) -> np.ndarray:
        """Returns the image as float32 (H, W, 3), laid out in tiles and normalized."""
        vision = self.cfg.vision
        return to_pixels(image_files.to_rgb(read(image), vision.rgb_conversion), vision)

    def pixel_scale(self) -> PixelScale:
        """Returns the scale of the pixel values of a batch."""
        return PixelScale(self.cfg.vision.image_mean, self.cfg.vision.image_std)

    @property
    def takes_conversations(self) -> bool:
        """True if a prompt may have turns before its question."""
        return self.cfg.data.is_conversations

    @property
    def takes_system_turn(self) -> bool:
        """True if a conversation may begin with a system turn."""
        return self.takes_conversations and has_system_turn(self.cfg, self.tokenizer)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        return self.tokenizer.eos_ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of an answer up to its end token, without surrounding whitespace."""
        return self.tokenizer.decode(ids).strip()

    def decode_stream(self) -> TextStream:
        """Returns a decoder that takes the ids of an answer as they are generated."""
        return TextStream(self.decode)


def load_processor(cfg: Experiment) -> RunProcessor:
    """Returns the processor of the run in `cfg.workdir`.

    Raises:
      ConfigError: the work folder has no tokenizer.
    """
    workdir = Workdir(cfg.workdir)
    if not workdir.tokenizer.exists():
        raise ConfigError(f"--workdir {workdir.path} has no {workdir.tokenizer.name}.")
    return RunProcessor(cfg, initial.load_tokenizer(cfg))


def load_params(cfg: Experiment, step: str | int | None = None) -> dict:
    """Returns the parameters of a checkpoint, in the dtype that the run computes in.

    Raises:
      ConfigError: no checkpoint exists (of this step), or none is complete.
    """
    state = _load_merged(cfg, step, dtype=cfg.train.compute_dtype)
    return cast_to_compute_dtype(cfg, state.params)


def load_model(
    workdir: str | os.PathLike,
    step: str | int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[VLM, dict, RunProcessor]:
    """Implements `vlm_jax.from_run`."""
    cfg = validate(Workdir(str(Path(os.path.expanduser(workdir)))).read_config())
    mesh = axes.make_mesh(MeshSizes()) if mesh is None else mesh
    state, tokenizer = _load_state(cfg, step, mesh, cfg.train.compute_dtype)
    params = cast_to_compute_dtype(cfg, state.params)
    return build_model(cfg), params, RunProcessor(cfg, tokenizer)


def load_with_step(cfg: Experiment, step: str | int | None = None) -> tuple[dict, Tokenizer, int]:
    """Returns `load_params`, the tokenizer, and the step of the checkpoint."""
    state, tokenizer = _load_state(cfg, step, dtype=cfg.train.compute_dtype)
    return cast_to_compute_dtype(cfg, state.params), tokenizer, int(state.step)


def load_untrained(cfg: Experiment) -> tuple[dict, Tokenizer, int]:
    """Returns the same as `load_with_step`, for the checkpoint in `init_from` before any training.

    Raises:
      ConfigError: the experiment has parameters that the checkpoint does not hold.
    """
    mesh = axes.make_mesh(cfg.mesh)
    like = abstract_state(cfg, mesh)
    flat_params = initial.load_parts(cfg, like, mesh)
    missing = traverse_util.flatten_dict(like.params, sep="/").keys() - flat_params.keys()
    if missing:
        raise ConfigError(
            f"init_from {cfg.init_from} does not hold the whole model: {len(missing)} parameters "
            f"are missing, such as {min(missing)}."
        )
    params = cast_to_compute_dtype(cfg, traverse_util.unflatten_dict(flat_params, sep="/"))
    return params, initial.load_tokenizer(cfg), 0


def load_stored(
    cfg: Experiment, step: str | int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[dict, Tokenizer]:
    """Returns the parameters of a checkpoint in their stored dtypes, and the tokenizer.

    Adapters are merged into their kernels, in float32.

    Args:
      step: of the checkpoint, or "best"; None or "last": the last complete one.

    Raises:
      ConfigError: no checkpoint exists, or none is complete.
    """
    state, tokenizer = _load_state(cfg, step, mesh)
    return state.params, tokenizer


def _load_state(
    cfg: Experiment,
    step: str | int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
) -> tuple[State, Tokenizer]:
    return _load_merged(cfg, step, mesh, dtype), load_processor(cfg).tokenizer


def _load_merged(
    cfg: Experiment,
    step: str | int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
) -> State:
    """Returns the state of a checkpoint; inference needs no adapters beside their kernels.

    Args:
      dtype: of the merged kernels; None: float32.
    """
    state = initial.load_state(cfg, step, mesh)
    return state.replace(params=lora.merge(cfg.lora, state.params, dtype))
