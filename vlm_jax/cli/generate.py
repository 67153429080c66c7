"""The command `generate`: answers of a training run or of a public checkpoint."""

import argparse
from collections.abc import Sequence

from vlm_jax.cli.model import (
    ANSWER_OPTIONS,
    MODEL_OPTIONS,
    answer_options,
    check_effect,
    open_model,
    parse_model,
)
from vlm_jax.cli.options import FILE
from vlm_jax.config import ConfigError, Experiment

GENERATE = """examples:
  python run.py generate --workdir runs/mine --image a.png --prompt "is there a circle?"
  python run.py generate --workdir runs/mine --image a.png b.png --prompt "is it red?" "what shape?"
  python run.py generate --checkpoint checkpoints/llava-1.5-7b-hf --image a.jpg --prompt "a cat?"
  python run.py generate --checkpoint checkpoints/gpt2 --prompt "Once upon" --temperature 0.7

Answers prompts about images, by a training run (--workdir) or a public checkpoint (--checkpoint).
One answer is printed while it is generated; several are generated together, and each is printed
behind its images and its prompt. With --workdir, fields of the sections data, mesh, distributed
and eval can be changed too (python run.py eval --workdir W --help lists them)."""
OPTIONS = {
    **MODEL_OPTIONS,
    "prompt": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "TEXT",
        "help": "one or more prompts; a checkpoint that writes captions needs none",
    },
    "image": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": FILE,
        "help": "one or more image files",
    },
    "images_per_prompt": {
        "choices": ("one", "all"),
        "help": "one: every prompt is asked about each image alone (default with --workdir); "
        "all: about all images together (default with --checkpoint)",
    },
    **ANSWER_OPTIONS,
    "no_chat": {
        "action": "store_true",
        "help": "pass prompts to a checkpoint as they are, without its chat template",
    },
}


def generate(arguments: list[str]) -> int:
    """Prints the answers to all prompts."""
    args, cfg = parse_model("generate", arguments, OPTIONS, GENERATE)
    from vlm_jax.infer import answer
    from vlm_jax.nn.models import build_model

    model = open_model(args, cfg)
    pairs = _pair(args)
    _check_pairs(args, model.cfg, pairs)
    options = answer_options(args, cfg)
    check_effect(options)
    request = answer.encode(
        build_model(model.cfg),
        model.load_processor(),
        [prompt for _, prompt in pairs],
        [images for images, _ in pairs],
        options,
        answer.LENGTH_MULTIPLE,
    )
    params = model.load_params()
    if len(pairs) > 1:
        for (images, prompt), text in zip(pairs, request.answers(params), strict=True):
            print(_label(images, prompt) + text)
        return 0
    label = _label(*pairs[0]) if args.workdir else ""
    for text in request.stream(params):
        print(label + text, end="", flush=True)
        label = ""
    print(label)
    return 0


def _pair(args: argparse.Namespace) -> list[tuple[list[str], str]]:
    """Returns the images and the prompt of every answer, image by image."""
    is_together = args.images_per_prompt == "all"
    if args.images_per_prompt is None:
        is_together = args.workdir is None
    rows = [args.image] if is_together or not args.image else [[file] for file in args.image]
    return [(row, prompt) for row in rows for prompt in args.prompt or [""]]


def _check_pairs(
    args: argparse.Namespace, cfg: Experiment, pairs: Sequence[tuple[list[str], str]]
) -> None:
    """Raises ConfigError if the model cannot take the prompts or the number of images."""
    if args.workdir:
        name = f"--workdir {args.workdir}"
        writes_captions = False
        takes_one_image = cfg.fusion.has_images and not cfg.data.is_conversations
    else:
        name = f"--checkpoint {args.checkpoint}"
        writes_captions = takes_one_image = cfg.fusion.is_encoder_decoder
    if args.image and not cfg.fusion.has_images:
        raise ConfigError(f"{name} is a text-only model: leave out --image.")
    if not args.prompt and not writes_captions:
        raise ConfigError(f'{name} needs --prompt "TEXT".')
    if not takes_one_image:
        return
    if not args.image:
        raise ConfigError(f"generate needs --image FILE: {name} takes one image per prompt.")
    if any(len(images) > 1 for images, _ in pairs):
        raise ConfigError(
            f"{name} takes one image per prompt: give one --image FILE, or --images-per-prompt one."
        )


def _label(images: list[str], prompt: str) -> str:
    """Returns the beginning of a line with an answer."""
    return "".join(f"{part}  " for part in [*images, prompt])
