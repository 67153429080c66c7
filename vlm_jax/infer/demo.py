"""A trained run, ready to be asked."""

import itertools

import jax

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.data import images as image_files
from vlm_jax.data import questions
from vlm_jax.data.tiles import to_pixels
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.infer.generate import Decoding, generate
from vlm_jax.train import initial
from vlm_jax.train.step import narrowed
from vlm_jax.workdir import Workdir


def load(cfg: Experiment) -> tuple[dict, Tokenizer]:
    """As `load_stored`, in the dtype that the run computes in."""
    params, tokenizer = load_stored(cfg)
    return narrowed(cfg, params), tokenizer


def load_stored(cfg: Experiment) -> tuple[dict, Tokenizer]:
    """Parameters of the run's last whole checkpoint, and its tokenizer.

    Raises:
      ConfigError: there is none, or none is whole.
    """
    params, workdir = initial.load_params(cfg), Workdir(cfg.workdir)
    if not workdir.tokenizer.exists():
        raise ConfigError(f"--workdir {workdir.path} holds no {workdir.tokenizer.name}.")
    return params, initial.load_tokenizer(cfg)


def ask(cfg: Experiment, files: list[str], prompts: list[str]) -> list[tuple[str, str, str]]:
    """(image file, prompt, answer) for every prompt about every image, images first.

    Raises:
      ConfigError: a file is no image, a prompt is too long, or the run has no checkpoint.
    """
    pixels = [to_pixels(image_files.read_image(file), cfg.vision) for file in files]
    params, tokenizer = load(cfg)
    pairs = list(itertools.product(range(len(files)), prompts))
    rows, asked = zip(*pairs)
    length = questions.prompt_length(cfg, tokenizer, prompts)
    batch = questions.prompt_batch(cfg, tokenizer, [[image] for image in pixels], asked, length, rows)
    made = jax.device_get(generate(cfg, params, batch, cfg.eval.max_new_tokens, Decoding(eos=(cfg.data.eos_id,))))
    return [(files[i], prompt, tokenizer.decode(ids).strip()) for (i, prompt), ids in zip(pairs, made)]
