"""Vision-language models in JAX/Flax in which the fusion style is one config field."""

import os


def from_pretrained(folder: str | os.PathLike, dtype=None, mesh=None, taps: str | None = None):
    """A folder of a public checkpoint -> (model, params, processor).

    `model.apply({"params": params}, batch).logits` are (B, S, V) for a batch of `processor(prompts, images)`, where a
    prompt may have any number of images. An encoder alone takes (B, height, width, channels).

    Args:
      folder: as downloaded from the Hugging Face hub, or as `save_pretrained` wrote it.
      dtype: of the parameters and of what is computed with them; None: as they are stored.
      mesh: of `vlm_jax.axes.make_mesh`: the parameters are created in its shards; None: all devices along `data`.
      taps: Llama 3.2 Vision only: whether intermediate features are what enters ("input", the default) or leaves
        ("output") their layers.

    Raises:
      ConfigError: the folder does not hold what its config.json says, or a family that is not supported.
    """
    from vlm_jax.hub.load import load_checkpoint
    from vlm_jax.hub.processor import Processor
    from vlm_jax.nn.models import model_of

    checkpoint, params = load_checkpoint(folder, dtype, mesh, taps)
    return model_of(checkpoint.cfg), params, Processor.load(checkpoint)


def save_pretrained(folder: str | os.PathLike, params, processor) -> None:
    """Writes the model that `processor` came with, trained further perhaps, so that transformers loads it.

    Raises:
      ConfigError: the folder cannot be written, or holds a model already.
    """
    from vlm_jax.hub.export import write_checkpoint

    write_checkpoint(folder, processor.checkpoint, params)
