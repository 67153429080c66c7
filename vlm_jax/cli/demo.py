"""The command `demo`: a page to chat with models and to see where they look."""

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vlm_jax.cli.model import (
    AGAINST,
    ANSWER_OPTIONS,
    MODEL_OPTIONS,
    answer_options,
    open_folder,
    open_model,
    parse_model,
)
from vlm_jax.cli.serve import ADDRESS_OPTIONS, PORTS, check_bounds, listen
from vlm_jax.config import ConfigError
from vlm_jax.runtime.packages import check_installed

DEMO = """examples:
  python run.py demo --workdir runs/mine
  python run.py demo --workdir runs/a --against runs/b
  python run.py demo --checkpoint checkpoints/llava-1.5-7b-hf --temperature 0.7

Serves a page for a browser: a conversation with images, with the attention map of every word of the
answers. --against answers the same questions with a second model beside the first. Options of
answers are the first values on the page. Ctrl-C ends it.
Needs pip install -r requirements-demo.txt."""
OPTIONS = {
    **MODEL_OPTIONS,
    "against": AGAINST,
    **ADDRESS_OPTIONS,
    "port": ADDRESS_OPTIONS["port"] | {"default": 7860, "help": "0: a free one (default: 7860)"},
    "system": {"metavar": "TEXT", "help": "system turn before every conversation"},
    **ANSWER_OPTIONS,
}
GRACE_SECONDS = 1  # a page in a browser keeps a connection open


def demo(arguments: list[str]) -> int:
    """Serves the page until the process is stopped."""
    args, cfg = parse_model("demo", arguments, OPTIONS, DEMO)
    check_bounds(args, {"port": PORTS})
    check_installed("gradio", "demo", "requirements-demo.txt")
    first = args.workdir or args.checkpoint
    if args.against and Path(args.against).resolve() == Path(first).resolve():
        raise ConfigError(f"--against {args.against} is the first model: name another one.")
    options = answer_options(args, cfg)
    models = {first: open_model(args, cfg)}
    if args.against:
        models[args.against] = open_folder("demo", args.against)
    # Uploads are removed after SIGTERM as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.getLogger("uvicorn.error").addFilter(_is_unexpected)
    with tempfile.TemporaryDirectory(prefix="vlm_jax_demo_") as uploads:
        # Not in a folder that other users of the machine share.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        from vlm_jax.demo.page import build_app
        from vlm_jax.serve.limits import Limits

        names = _names(models)
        loaded = [_load(args.system, names[folder], model) for folder, model in models.items()]
        app = build_app(loaded, options, Limits())
        listen(app, args, f"demo of {' and '.join(names.values())}", "", GRACE_SECONDS)
    return 0


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Returns False for messages about the connections of open pages when the command ends."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and "graceful" not in str(record.msg)


def _names(models: Mapping) -> dict[str, str]:
    """Returns the name of the model in each folder; the folder itself if two would be alike."""
    names = {
        folder: f"{Path(folder).resolve().name} ({model.cfg.fusion.kind})"
        for folder, model in models.items()
    }
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def _load(system: str | None, name: str, model):
    """Returns an `infer.models.TextModel` as a `ChatModel`."""
    from vlm_jax.demo.talk import ChatModel

    processor = model.load_processor()
    if system and not processor.takes_system_turn:
        raise ConfigError(f"--system: the prompt form of {name} has no system turn.")
    return ChatModel(name, model.cfg, processor, model.load_params(), system)
