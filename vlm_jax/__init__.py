"""Vision-language models in JAX/Flax in which the fusion style is one config field."""

import os
from collections.abc import Sequence

__version__ = "0.1.0"


def from_pretrained(
    folder: str | os.PathLike,
    dtype=None,
    mesh=None,
    intermediate_layers: str | None = None,
    adapter: str | os.PathLike | None = None,
):
    """Loads the folder of a public checkpoint; returns (model, params, processor).

    `model.apply({"params": params}, batch).logits` are (B, S, V) for a batch of
    `processor(prompts, images)`, where a prompt may have any number of images. An encoder alone
    takes images (B, height, width, channels).

    Args:
      folder: as downloaded from the Hugging Face hub, or as `save_pretrained` wrote it.
      dtype: of the parameters and the computation; None: as stored.
      mesh: of `vlm_jax.axes.make_mesh`, on which the parameters are created in shards; None: all
        devices along `data`.
      intermediate_layers: Llama 3.2 Vision only: whether `intermediate_layers_indices` of
        config.json count the inputs of layers ("input", the default: Meta's code and transformers
        up to 4.51) or their outputs ("output": transformers 5).
      adapter: folder of a LoRA adapter that PEFT or `export --adapter` wrote; it is merged into
        the parameters.

    Raises:
      UserError: the folder is damaged, its tensors do not match its config.json, its family is not
        supported, or the adapter is not supported or belongs to another model.
    """
    from vlm_jax.hub.load import load_checkpoint
    from vlm_jax.hub.processor import HubProcessor
    from vlm_jax.nn.models import build_model

    checkpoint, params = load_checkpoint(folder, dtype, mesh, intermediate_layers, adapter)
    return build_model(checkpoint.cfg), params, HubProcessor.load(checkpoint)


def from_run(workdir: str | os.PathLike, step: str | int | None = None, mesh=None):
    """Loads a training run; returns (model, params, processor) like `from_pretrained`.

    Parameters have the compute dtype of the run; prompts are formatted as its training data.

    Args:
      workdir: `--workdir` of the run.
      step: of the checkpoint to load, or "best" by `train.best_metric`; None or "last": the last
        one.
      mesh: of `vlm_jax.axes.make_mesh`, which may differ from that of the training; None: all
        devices along `data`.

    Raises:
      UserError: the folder holds no run, or no checkpoint (of this step).
    """
    from vlm_jax.infer.run import load_model

    return load_model(workdir, step, mesh)


def generate(
    model,
    params,
    processor,
    prompts,
    images=(),
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = True,
    stop: str | Sequence[str] = (),
) -> list[str]:
    """Generates the answer to each prompt; by default the text that `vlm-jax generate` prints.

    An answer ends at an end-of-text token, before a stop string, after `max_new_tokens`, or at the
    last position of the model.

    Args:
      model, params, processor: of `from_pretrained` or `from_run`.
      prompts: texts; a single `str` is a batch of one.
      images: one list per prompt of files, open Pillow images or uint8 arrays (height, width, 3);
        for a single `str` the list of its images.
      max_new_tokens: most tokens of an answer.
      temperature: 0 takes the most likely token; otherwise tokens are sampled.
      top_k: samples from the k most likely tokens only; 0: from all.
      top_p: samples from the most likely tokens that together have this probability.
      seed: of the sampling.
      chat: formats prompts by the chat template of a public checkpoint, if it has one; False passes
        them as they are. A run always formats prompts as its training data, and refuses False.
      stop: texts that end an answer and are not part of it; a single `str` is one of them.

    Raises:
      UserError: an option is out of range, a prompt is too long, or the images do not match the
        prompts.
    """
    from vlm_jax.infer.answer import AnswerOptions, answer

    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    options = AnswerOptions(max_new_tokens, temperature, top_k, top_p, seed, chat, stop)
    return answer(model, params, processor, prompts, images, options)


def look(model, params, batch, *, rollout: bool = False, gradient: bool = False):
    """Returns where the model looks: for each row, the attention of every answer token over images.

    Args:
      model, params: of `from_pretrained` or `from_run`.
      batch: of `processor(prompts, images, answers=answers)`; the tokens that it scores are looked
        at.
      rollout: also computes attention rollout (Abnar and Zuidema 2020).
      gradient: also computes gradient-weighted relevance (Chefer et al. 2021), one backward pass
        for each token.

    Returns:
      A list of `vlm_jax.infer.look.maps.AttentionMaps`: `weights` by layer and head, and
      `combine("mean")`, "max", "rollout" or "gradient", over the patches of every image.

    Raises:
      UserError: the model reads no image, or the batch has no image or no answer.
    """
    from vlm_jax.infer.look.maps import look

    return look(model, params, batch, rollout, gradient)


def save_pretrained(folder: str | os.PathLike, params, processor) -> None:
    """Writes a model of `from_pretrained`, trained further or not, so that transformers loads it.

    Raises:
      UserError: the folder cannot be written, or already holds a model.
    """
    from vlm_jax.hub.export import write_checkpoint

    write_checkpoint(folder, processor.checkpoint, params)
