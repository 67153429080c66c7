"""The command `look`: attention maps of the words of an answer."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_jax.cli.generate import OPTIONS
from vlm_jax.cli.model import (
    AGAINST,
    MODEL_OPTIONS,
    open_folder,
    open_model,
    parse_model,
    spell,
)
from vlm_jax.cli.options import FOLDER
from vlm_jax.config import ConfigError
from vlm_jax.infer.look import COMPUTED, METHODS
from vlm_jax.runtime.workdir import is_run

if TYPE_CHECKING:
    from vlm_jax.infer.answer import Request
    from vlm_jax.infer.look.answer import WordMaps
    from vlm_jax.infer.models import TextModel

LOOK = """examples:
  python run.py look --workdir runs/mine --image a.png --prompt "what shape is shown?"
  python run.py look --workdir runs/a --against runs/b --image a.png --prompt "is it red?"
  python run.py look --checkpoint checkpoints/llava-1.5-7b-hf --image a.jpg --prompt "a cat?"

Answers a prompt about images, and writes where the model looked for each word of the answer:
look.html, to explore by word, layer and head, and look.png. docs/attention_maps.md explains the
maps."""
PNG, HTML = "look.png", "look.html"
MAX_NEW_TOKENS = 64  # of a checkpoint, by default
LOOK_OPTIONS = {
    **MODEL_OPTIONS,
    "against": AGAINST,
    "image": OPTIONS["image"],
    "prompt": {"metavar": "TEXT", "help": "the prompt; a model that writes captions needs none"},
    "max_new_tokens": {
        "type": int,
        "metavar": "N",
        "help": "most tokens of the answer (default: eval.max_new_tokens of a run, "
        f"{MAX_NEW_TOKENS} of a checkpoint)",
    },
    "method": {
        "choices": METHODS,
        "default": "mean",
        "help": f"how {PNG} combines layers and heads (default: mean); gradient takes a backward "
        f"pass for each token. {HTML} has mean, max and this method",
    },
    "output": {
        "metavar": FOLDER,
        "default": ".",
        "help": f"folder of {PNG} and {HTML}, which are replaced (default: this folder)",
    },
    "no_chat": OPTIONS["no_chat"],
}


def look(arguments: list[str]) -> int:
    """Writes the attention maps of one answer."""
    args, cfg = parse_model("look", arguments, LOOK_OPTIONS, LOOK)
    if not args.image:
        raise ConfigError("look needs --image FILE.")
    models = [_checked(args, args.workdir or args.checkpoint, open_model(args, cfg))]
    if args.against:
        models.append(_checked(args, args.against, open_folder("look", args.against)))
    # Both prompts are checked before the parameters of a model are loaded.
    requests = [_encode(args, *model) for model in models]
    answers = []
    for (name, model), request in zip(models, requests):
        answers.append(_look_at(args, name, model, request))
    _write(Path(args.output), answers, args.method)
    return 0


def _checked(args: argparse.Namespace, folder: str, model: "TextModel") -> tuple[str, "TextModel"]:
    """Returns the name of a model that has maps and a prompt, and the model."""
    from vlm_jax.infer.look.maps import check_maps

    check_maps(model.cfg.model)
    takes_no_prompt = not is_run(folder) and model.cfg.fusion.is_encoder_decoder
    if args.prompt is None and not takes_no_prompt:
        raise ConfigError(f'look needs --prompt "TEXT" for {folder}.')
    return f"{Path(folder).name} ({model.cfg.fusion.kind})", model


def _encode(args: argparse.Namespace, name: str, model: "TextModel") -> "Request":
    from vlm_jax.infer.answer import AnswerOptions, encode
    from vlm_jax.infer.run import RunProcessor
    from vlm_jax.nn.models import build_model

    processor = model.load_processor()
    most = args.max_new_tokens
    of_run = isinstance(processor, RunProcessor)
    if most is None:
        most = model.cfg.eval.max_new_tokens if of_run else MAX_NEW_TOKENS
    # A run always formats prompts as its training data.
    options = AnswerOptions(max_new_tokens=most, chat=of_run or not args.no_chat)
    options.check(spell)
    if len(args.image) > 1 and of_run and not model.cfg.data.is_conversations:
        raise ConfigError(f"{name} takes one image per prompt: give one --image FILE.")
    prompts = [args.prompt or ""]
    return encode(build_model(model.cfg), processor, prompts, [args.image], options)


def _look_at(
    args: argparse.Namespace, name: str, model: "TextModel", request: "Request"
) -> "WordMaps":
    from vlm_jax.infer.look.answer import look_at_answer
    from vlm_jax.infer.look.pictures import image_layouts

    methods = [name for name in COMPUTED if name == args.method]
    layouts = image_layouts(model.cfg.vision, args.image, request.processor)
    answer = look_at_answer(request, model.load_params(), name, layouts, methods)
    print(f"{name}: {answer.answer}")
    return answer


def _write(folder: Path, answers: Sequence["WordMaps"], method: str) -> None:
    from vlm_jax.infer.look.figure import draw_maps
    from vlm_jax.infer.look.page import merge_heads, write_page

    folder.mkdir(parents=True, exist_ok=True)
    merged = [merge_heads(answer) for answer in answers]
    for answer, of_page in zip(answers, merged):
        if of_page is not answer:
            print(f"{answer.model}: {HTML} has the mean of all heads, to be small enough to open")
    draw_maps(folder / PNG, answers, method)
    write_page(folder / HTML, merged, method)
    print(f"maps: {folder / PNG}   to explore: {folder / HTML}")
