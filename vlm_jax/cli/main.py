"""The entry point of the command line: chooses a command, and turns errors into exit codes."""

import os
import sys
from collections.abc import Callable

from vlm_jax import __version__
from vlm_jax.cli.chat import chat
from vlm_jax.cli.checkpoints import export, verify
from vlm_jax.cli.data import DATA, DATA_OPTIONS, data
from vlm_jax.cli.demo import demo
from vlm_jax.cli.experiment import OPTIONS, names_experiment
from vlm_jax.cli.experiment import USAGE as FIELDS
from vlm_jax.cli.failures import describe_failure
from vlm_jax.cli.generate import generate
from vlm_jax.cli.look import look
from vlm_jax.cli.options import format_help
from vlm_jax.cli.plan import DIFF, PLAN, PLAN_OPTIONS, diff, plan
from vlm_jax.cli.score import score
from vlm_jax.cli.serve import serve
from vlm_jax.cli.train import EVAL, EVAL_OPTIONS, TRAIN, evaluate, train
from vlm_jax.config import ConfigError, RunError, UserError
from vlm_jax.config.hints import nearest, suggestion

USAGE = """usage: python run.py [COMMAND] [--config FILE] [--section.field VALUE ...]

examples:
  python run.py --config configs/easy_vqa/unified.py
  python run.py --config configs/easy_vqa/unified.py --fusion.kind cross_attention \\
      --optim.learning_rate 5e-4 --workdir runs/mine
  python run.py eval --workdir runs/mine --eval.max_examples 500
  python run.py generate --workdir runs/mine --image a.png --prompt "what color is the shape?"
  python run.py generate --checkpoint checkpoints/llava-1.5-7b-hf --image a.jpg --prompt "a cat?"
  python run.py plan --config configs/tpu/llava_1_5_7b_stage_2.py --devices 64

commands:
  train     (default) --config FILE [--workdir W]: train an experiment and evaluate it
            --workdir W: continue a run that was stopped
            --checkpoint DIR --data.files F: fine-tune a public checkpoint
  eval      --workdir W [--eval.split S]: evaluate a run again, into W/eval/NAME
            --checkpoint DIR --data.files F: evaluate a public checkpoint
  data      --config FILE [--rows N] [--json]: show what a run will be trained on
  score     --predictions FILE.jsonl --metrics A,B: score answers of a file
  generate  --workdir W --image A.png --prompt "...": answer prompts with a run
            --checkpoint DIR --image A.png --prompt "...": answer them with a public checkpoint
  look      --workdir W --image A.png --prompt "...": where the model looks for each word
            --against W2: two models side by side
  chat      --workdir W | --checkpoint DIR: a conversation, with images
  serve     --workdir W | --checkpoint DIR [--port P]: a server with OpenAI's API
  demo      --workdir W | --checkpoint DIR [--against W2]: chat and attention maps in a browser
  verify    --checkpoint DIR --reference FILE.npz: compare with the outputs of a reference
  export    --checkpoint DIR_OR_WORKDIR --output DIR: write a folder that transformers loads
  plan      --config FILE [--topology v5e:8x8 | --devices N]: predict the cost of a step
  diff      A.py B.py: print the fields in which two configs differ

help:
  python run.py --version                           the version of vlm_jax
  python run.py COMMAND --help                      the options of a command
  python run.py COMMAND --config FILE --help        every field, with its value"""
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "data": data,
    "score": score,
    "generate": generate,
    "look": look,
    "chat": chat,
    "serve": serve,
    "demo": demo,
    "verify": verify,
    "export": export,
    "plan": plan,
    "diff": diff,
}
# Arguments of `format_help`. The other commands print their help themselves.
HELP = {
    "train": (FIELDS, OPTIONS, TRAIN),
    "eval": (FIELDS, EVAL_OPTIONS, EVAL),
    "data": (FIELDS, OPTIONS | DATA_OPTIONS, DATA),
    "plan": (FIELDS, OPTIONS | PLAN_OPTIONS, PLAN),
    "diff": ("A.py B.py", {}, DIFF),
}
# The exit code that a shell reports for a command that SIGPIPE ends.
BROKEN_PIPE = 141


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: success. 1: a run failed. 2: a mistake of the user. 75: SIGTERM stopped a run, which the same
    command continues. 130: Ctrl-C. 141: the reader of the output, such as `head`, has ended.
    """
    try:
        try:
            return _run_command(sys.argv[1:] if arguments is None else arguments)
        finally:
            # An error here can be handled, but one at the exit of the interpreter cannot.
            sys.stdout.flush()
    except BrokenPipeError:
        # The text that could not be written is flushed once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run_command(arguments: list[str]) -> int:
    """Runs one command; prints the message of an error."""
    command, rest = "", arguments
    if arguments and not arguments[0].startswith("-"):
        command, *rest = arguments
    try:
        if not arguments:
            print(USAGE)
            return 2
        if arguments == ["--version"]:
            print(__version__)
            return 0
        if command in ("", *HELP) and _asks_for_help(rest):
            print(format_help(command, *HELP[command]) if command else USAGE)
            return 0
        command = command or "train"
        if command not in COMMANDS:
            hint = nearest(command, COMMANDS)
            if command.endswith(".py"):
                hint = suggestion([f"--config {command}"])
            raise ConfigError(f"unknown command {command!r}{hint}: choose {', '.join(COMMANDS)}.")
        return COMMANDS[command](rest)
    except BrokenPipeError:
        raise
    except (UserError, RunError, OSError, ModuleNotFoundError, KeyboardInterrupt) as error:
        code, message = describe_failure(error)
        print(message, file=sys.stderr)
        return code


def _asks_for_help(arguments: list[str]) -> bool:
    """Returns whether --help is given without an experiment whose fields it could list."""
    return bool({"-h", "--help"} & set(arguments)) and not names_experiment(arguments)
