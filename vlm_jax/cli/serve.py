"""The command `serve`: a server with OpenAI's API for a training run or a public checkpoint."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from vlm_jax.cli.model import (
    ANSWER_OPTIONS,
    MODEL_OPTIONS,
    answer_options,
    open_model,
    parse_model,
    spell,
)
from vlm_jax.config import ConfigError
from vlm_jax.runtime.packages import check_installed

SERVE = """examples:
  python run.py serve --checkpoint checkpoints/llava-1.5-7b-hf
  python run.py serve --workdir runs/mine --port 8001 --temperature 0.7

Answers /v1/chat/completions and /v1/models as OpenAI's API does, and has /health and /metrics.
Options of answers are the defaults for requests that leave them out. Ctrl-C or SIGTERM ends the
server after the requests that it has. Needs pip install -r requirements-serve.txt."""
ADDRESS_OPTIONS = {
    "host": {
        "default": "127.0.0.1",
        "metavar": "ADDRESS",
        "help": "0.0.0.0 lets other machines in (default: 127.0.0.1)",
    },
    "port": {"type": int, "default": 8000, "metavar": "N", "help": "0: a free one (default: 8000)"},
}
OPTIONS = {
    **MODEL_OPTIONS,
    **ADDRESS_OPTIONS,
    "api_key": {
        "default": os.environ.get("VLM_JAX_API_KEY", ""),
        "metavar": "KEY",
        "help": "key that requests must have (default: $VLM_JAX_API_KEY, or none)",
    },
    "model_name": {"metavar": "NAME", "help": "of the model in requests (default: its folder)"},
    "max_batch": {
        "type": int,
        "default": 8,
        "metavar": "N",
        "help": "most requests that are answered together (default: 8)",
    },
    "max_queue": {
        "type": int,
        "default": 64,
        "metavar": "N",
        "help": "most requests that wait (default: 64)",
    },
    "time_limit_seconds": {
        "type": float,
        "default": 300.0,
        "metavar": "S",
        "help": "of a request, waiting included (default: 300)",
    },
    "allow_http_images": {
        "action": "store_true",
        "help": "download images of http URLs: clients can then reach the network of the server",
    },
    **ANSWER_OPTIONS,
}
PORTS = (0, 65_535)
BOUNDS = {
    "port": PORTS,
    "max_batch": (1, 256),
    "max_queue": (1, 100_000),
    "time_limit_seconds": (0.1, 86_400),
}
GRACE_SECONDS = 30  # for the requests that are being answered when the server is stopped


def serve(arguments: list[str]) -> int:
    """Serves a model until the process is stopped."""
    args, cfg = parse_model("serve", arguments, OPTIONS, SERVE)
    check_bounds(args, BOUNDS)
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        check_installed(package, "serve", "requirements-serve.txt")
    options = answer_options(args, cfg)
    from vlm_jax.nn.models import build_model
    from vlm_jax.serve.app import Settings, build_app
    from vlm_jax.serve.engine import Engine
    from vlm_jax.serve.limits import Limits

    model = open_model(args, cfg)
    processor = model.load_processor()
    limits = Limits(args.max_batch, args.max_queue, args.time_limit_seconds)
    engine = Engine(build_model(model.cfg), model.load_params(), processor, limits)
    name = args.model_name or Path(args.workdir or args.checkpoint).resolve().name
    settings = Settings(name, options, args.api_key, args.allow_http_images)
    listen(build_app(engine, settings), args, f"serving {name}", "/v1", GRACE_SECONDS)
    return 0


def check_bounds(args: argparse.Namespace, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raises ConfigError if the value of an option is out of its bounds."""
    for name, (least, most) in bounds.items():
        value = getattr(args, name)
        if not least <= value <= most:
            raise ConfigError(f"{spell(name)} {value}: it must be from {least} to {most}.")


def listen(app, args: argparse.Namespace, message: str, path: str, grace_seconds: int) -> None:
    """Serves an application on --host and --port until the process is stopped.

    Args:
      app: the application, ASGI.
      message: printed first, with the address.
      path: end of this address.
      grace_seconds: for open connections when the process is stopped.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=grace_seconds,
    )
    with config.bind_socket() as socket:
        address = socket.getsockname()
        print(f"{message} on http://{args.host}:{address[1]}{path}", flush=True)
        uvicorn.Server(config).run([socket])
