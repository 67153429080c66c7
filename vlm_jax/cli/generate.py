"""The command `generate`: answers of a training run or of a public checkpoint."""

import argparse
from collections.abc import Sequence

from vlm_jax.cli.experiment import parse_experiment
from vlm_jax.cli.options import ADAPTER, FILE, FOLDER, INTERMEDIATE_LAYERS, STEP, parse_options
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.runtime.workdir import is_run

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
    "workdir": {"metavar": FOLDER, "help": "work folder of a training run"},
    "checkpoint": {"metavar": FOLDER, "help": "folder of a public checkpoint"},
    "step": STEP,
    "adapter": ADAPTER,
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
    "max_new_tokens": {
        "type": int,
        "metavar": "N",
        "help": "most tokens of an answer (default: eval.max_new_tokens of a run, 256 of a "
        "checkpoint)",
    },
    "temperature": {
        "type": float,
        "default": 0.0,
        "metavar": "T",
        "help": "of the sampling; 0 takes the most likely token (default: 0)",
    },
    "top_k": {
        "type": int,
        "default": 0,
        "metavar": "K",
        "help": "sample from the K most likely tokens; 0: from all (default: 0)",
    },
    "top_p": {
        "type": float,
        "default": 1.0,
        "metavar": "P",
        "help": "sample from the most likely tokens with total probability P (default: 1)",
    },
    "seed": {"type": int, "default": 0, "metavar": "N", "help": "of the sampling (default: 0)"},
    "stop": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "TEXT",
        "help": "texts that end an answer and are not part of it",
    },
    "no_chat": {
        "action": "store_true",
        "help": "pass prompts to a checkpoint as they are, without its chat template",
    },
    "intermediate_layers": INTERMEDIATE_LAYERS,
}
CHECKPOINT_ONLY = ("adapter", "no_chat", "intermediate_layers")


def generate(arguments: list[str]) -> int:
    """Prints the answers to all prompts."""
    names_run = any(argument.partition("=")[0] == "--workdir" for argument in arguments)
    args, fields = parse_options("generate", arguments, OPTIONS, GENERATE, keep_unknown=names_run)
    check_model_options("generate", args)
    cfg = _parse_run(args, fields) if args.workdir else None
    from vlm_jax.infer import answer, models
    from vlm_jax.nn.models import build_model

    if cfg:
        model = models.open_run(cfg, args.step)
    else:
        model = models.open_checkpoint(args.checkpoint, args.intermediate_layers, args.adapter)
    pairs = _pair(args)
    _check_pairs(args, model.cfg, pairs)
    options = _answer_options(args, cfg)
    options.check(spell)
    request = answer.encode(
        build_model(model.cfg),
        model.load_processor(),
        [prompt for _, prompt in pairs],
        [images for images, _ in pairs],
        options,
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


def _parse_run(args: argparse.Namespace, fields: list[str]) -> Experiment:
    """Returns the experiment of the run in --workdir, with changed fields."""
    help_texts = {name.replace("_", "-"): option["help"] for name, option in OPTIONS.items()}
    arguments = ["--workdir", args.workdir, *fields]
    return parse_experiment("generate", arguments, stored=True, options=help_texts)


def check_model_options(command: str, args: argparse.Namespace) -> None:
    """Raises ConfigError unless the options name one model, a run or a checkpoint."""
    if not args.workdir and not args.checkpoint:
        raise ConfigError(
            f"{command} needs --workdir DIR, the folder of a run, or --checkpoint DIR, a public "
            "checkpoint."
        )
    if args.workdir and args.checkpoint:
        raise ConfigError(
            f"--workdir {args.workdir} and --checkpoint {args.checkpoint} are two models: leave "
            "one out."
        )
    for name in CHECKPOINT_ONLY:
        if args.workdir and getattr(args, name):
            raise ConfigError(f"{spell(name)} applies to --checkpoint only, not to --workdir.")
    # Not an option of every command.
    if args.checkpoint and getattr(args, "step", None) is not None:
        raise ConfigError("--step applies to --workdir only, not to --checkpoint.")
    if args.checkpoint and is_run(args.checkpoint):
        raise ConfigError(
            f"--checkpoint {args.checkpoint} is the folder of a run: name it with --workdir "
            f"{args.checkpoint}."
        )


def _answer_options(args: argparse.Namespace, cfg: Experiment | None):
    from vlm_jax.infer.answer import AnswerOptions

    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    if args.max_new_tokens is not None:
        sampling["max_new_tokens"] = args.max_new_tokens
    elif cfg:
        sampling["max_new_tokens"] = cfg.eval.max_new_tokens
    return AnswerOptions(**sampling, chat=not args.no_chat, stop=tuple(args.stop))


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


def spell(name: str) -> str:
    """Returns an option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"
