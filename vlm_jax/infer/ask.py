"""A public checkpoint answers a prompt about images, token by token."""

import argparse
from collections.abc import Iterator

import jax

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.hub.load import Checkpoint, inspect, load_params
from vlm_jax.hub.processor import Processor
from vlm_jax.hub.tensors.folder import open_tensors
from vlm_jax.infer.generate import SamplingParams, stream


def answer(given: argparse.Namespace) -> Iterator[str]:
    """Pieces of text as they become certain; `given` has the options of `generate --checkpoint`.

    Raises:
      ConfigError: the checkpoint cannot be loaded or writes no text, an image file is none, or the prompt is too long.
    """
    with open_tensors(given.checkpoint) as tensors:
        checkpoint = inspect(given.checkpoint, tensors, given.taps)
    _refuse_what_it_cannot_read(checkpoint, given)
    processor = Processor.load(checkpoint)
    prompt = processor.asked(given.prompt or "", given.image)
    room = checkpoint.cfg.decoder.max_positions - int(prompt.positions.max()) - 1
    if room < 1:
        raise ConfigError(
            f"--prompt is too long: the model reads {checkpoint.cfg.decoder.max_positions} tokens."
        )
    how = SamplingParams(processor.tokenizer.eos_ids, given.temperature, given.top_k, given.top_p)
    text = processor.tokenizer.stream()
    _, params = load_params(
        given.checkpoint, taps=given.taps
    )  # gigabytes perhaps: when all else is well
    tokens = stream(
        checkpoint.cfg.model,
        params,
        prompt,
        min(given.max_new_tokens, room),
        how,
        jax.random.key(given.seed),
    )
    for (token,) in tokens:
        if token not in how.eos:
            yield text.feed([token])
    yield text.end()


def _refuse_what_it_cannot_read(checkpoint: Checkpoint, given: argparse.Namespace) -> None:
    if not isinstance(checkpoint.cfg, Experiment):
        raise ConfigError(f"--checkpoint {given.checkpoint} is an encoder: it writes no text.")
    fusion = checkpoint.cfg.fusion
    if given.image and not fusion.has_images:
        raise ConfigError(f"--checkpoint {given.checkpoint} reads no images: leave out --image.")
    if fusion.is_encoder_decoder and len(given.image) != 1:
        raise ConfigError(
            f"--checkpoint {given.checkpoint} writes about one image: give --image FILE, and no more."
        )
    if not fusion.is_encoder_decoder and given.prompt is None:
        raise ConfigError(
            f'--checkpoint {given.checkpoint} answers a prompt: give --prompt "TEXT".'
        )
