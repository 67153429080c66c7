"""A public checkpoint answers a prompt about images, token by token."""

import argparse
from collections.abc import Iterator

import jax

from vlm_jax.config import ConfigError, Experiment
from vlm_jax.hub.load import load_checkpoint
from vlm_jax.hub.processor import Processor
from vlm_jax.infer.generate import Decoding, stream


def answer(given: argparse.Namespace) -> Iterator[str]:
    """Pieces of text as they become certain; `given` has the options of `generate --checkpoint`.

    Raises:
      ConfigError: the checkpoint cannot be loaded or writes no text, an image file is none, or the prompt is too long.
    """
    checkpoint, params = load_checkpoint(given.checkpoint, taps=given.taps)
    if not isinstance(checkpoint.cfg, Experiment):
        raise ConfigError(f"--checkpoint {given.checkpoint} is an encoder: it writes no text.")
    if given.image and not checkpoint.cfg.fusion.has_images:
        raise ConfigError(f"--checkpoint {given.checkpoint} reads no images: leave out --image.")
    processor = Processor.load(checkpoint)
    prompt = processor([processor.chat(given.prompt, len(given.image))], [given.image])
    room = checkpoint.cfg.decoder.max_positions - int(prompt.positions.max()) - 1
    if room < 1:
        raise ConfigError(f"--prompt is too long: the model reads {checkpoint.cfg.decoder.max_positions} tokens.")
    how = Decoding(checkpoint.eos_ids, given.temperature, given.top_k, given.top_p)
    text = processor.tokenizer.stream()
    tokens = stream(checkpoint.cfg, params, prompt, min(given.max_new_tokens, room), how, jax.random.key(given.seed))
    for (token,) in tokens:
        if token not in checkpoint.eos_ids:
            yield text.feed([token])
    yield text.end()
