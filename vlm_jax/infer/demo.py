"""A trained run, ready to be asked."""

import itertools
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
from vlm_jax.data.conversation_files import IMAGE_PLACEHOLDER
from vlm_jax.data.tiling import to_pixels
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.images.steps import (
    ImageInput,
    ImageInputs,
    read,
    to_rows,
)
from vlm_jax.hub.text.prompt_formats import check_answers
from vlm_jax.infer import answers
from vlm_jax.nn.models import build_model
from vlm_jax.nn.vlm import VLM
from vlm_jax.runtime.workdir import Workdir
from vlm_jax.structs import Batch, State
from vlm_jax.train import initial
from vlm_jax.train.step import abstract_state, cast_to_compute_dtype


@dataclass(frozen=True)
class RunProcessor:
    """Text and images -> what the model of a run reads; the same calls as those of `hub.processor.Processor`."""

    cfg: Experiment
    tokenizer: Tokenizer

    def __call__(
        self,
        prompts: str | Sequence[str],
        images: ImageInputs = (),
        *,
        chat: bool = True,
        answers: Sequence[str] | None = None,
    ) -> Batch:
        """Prompts and the images of each -> a batch to continue, or to train on, padded on the left.

        An image that several prompts share is encoded once if their rows hold the same objects.

        Args:
          chat: unused: a prompt always takes the form that the questions had in training.
          answers: one for each prompt: the batch has them, and `targets` and `loss_weights` that score them.

        Raises:
          ConfigError: the images or answers do not match the prompts, or an image cannot be read.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        images = to_rows(images, prompts, IMAGE_PLACEHOLDER)
        if answers is not None:
            check_answers(answers, prompts)
        keys = [tuple(map(id, row)) for row in images]
        shared = dict(zip(keys, images))
        pixels = [[self._pixels(picture) for picture in row] for row in shared.values()]
        owners = [list(shared).index(key) for key in keys]
        return questions.prompt_batch(
            self.cfg, self.tokenizer, pixels, prompts, image_rows=owners, answers=answers
        )

    def _pixels(self, picture: ImageInput) -> np.ndarray:
        """(H, W, 3) float32, laid out in tiles and normalised."""
        return to_pixels(image_files.to_rgb(read(picture)), self.cfg.vision)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token that ends an answer."""
        return (self.tokenizer.eos_id,)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer, up to the token that ends it, without the spaces around it."""
        return self.tokenizer.decode(ids).strip()


def load_model(
    workdir: str | os.PathLike, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[VLM, dict, RunProcessor]:
    """`vlm_jax.from_run`."""
    cfg = validate(Workdir(str(Path(workdir).expanduser())).read_config())
    params, tokenizer = load_stored(
        cfg, step, axes.make_mesh(MeshSizes()) if mesh is None else mesh
    )
    return build_model(cfg), cast_to_compute_dtype(cfg, params), RunProcessor(cfg, tokenizer)


def load(cfg: Experiment) -> tuple[dict, Tokenizer]:
    """As `load_stored`, in the dtype that the run computes in."""
    params, tokenizer, _ = load_with_step(cfg)
    return params, tokenizer


def load_with_step(cfg: Experiment) -> tuple[dict, Tokenizer, int]:
    """As `load`, with the step of the checkpoint."""
    state, tokenizer = _load_state(cfg)
    return cast_to_compute_dtype(cfg, state.params), tokenizer, int(state.step)


def load_untrained(cfg: Experiment) -> tuple[dict, Tokenizer, int]:
    """As `load_with_step`, of the checkpoint that `init_from` names, before any training.

    Raises:
      ConfigError: the experiment has parameters that the checkpoint does not hold.
    """
    mesh = axes.make_mesh(cfg.mesh)
    like = abstract_state(cfg, mesh)
    params = initial.load_parts(cfg, like, mesh)
    missing = traverse_util.flatten_dict(like.params, sep="/").keys() - params.keys()
    if missing:
        raise ConfigError(
            f"init_from {cfg.init_from} does not hold the whole model: {len(missing)} parameters are missing, such as "
            f"{min(missing)}."
        )
    return (
        cast_to_compute_dtype(cfg, traverse_util.unflatten_dict(params, sep="/")),
        initial.load_tokenizer(cfg),
        0,
    )


def load_stored(
    cfg: Experiment, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[dict, Tokenizer]:
    """Parameters of a checkpoint of the run, of its last whole one by default, and its tokenizer.

    Raises:
      ConfigError: no checkpoint exists, or none is whole.
    """
    state, tokenizer = _load_state(cfg, step, mesh)
    return state.params, tokenizer


def _load_state(
    cfg: Experiment, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[State, Tokenizer]:
    state, workdir = initial.load_state(cfg, step, mesh), Workdir(cfg.workdir)
    if not workdir.tokenizer.exists():
        raise ConfigError(f"--workdir {workdir.path} holds no {workdir.tokenizer.name}.")
    return state, initial.load_tokenizer(cfg)


def ask(cfg: Experiment, files: list[str], prompts: list[str]) -> list[tuple[str, ...]]:
    """(image file, prompt, answer) for every prompt about every image, images first; (prompt, answer) without images.

    Raises:
      ConfigError: a file is not an image, a prompt is too long, or the run has no checkpoint.
      NonFiniteLogits: the model computes NaN for a prompt.
    """
    params, tokenizer = load(cfg)
    questions.prompt_length(cfg, tokenizer, prompts, images=min(len(files), 1))
    pairs = list(itertools.product([[file] for file in files] or [[]], prompts))
    images, asked = map(list, zip(*pairs))
    processor = RunProcessor(cfg, tokenizer)
    texts = answers.answer(
        build_model(cfg), params, processor, asked, images, max_new_tokens=cfg.eval.max_new_tokens
    )
    return [(*shown, prompt, text) for (shown, prompt), text in zip(pairs, texts)]
