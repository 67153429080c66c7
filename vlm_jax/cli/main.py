"""The entry point of the command line: chooses a command, and turns errors into exit codes."""

import sys
from collections.abc import Callable

from vlm_jax.cli.checkpoints import export, verify
from vlm_jax.cli.failures import describe_failure
from vlm_jax.cli.generate import generate
from vlm_jax.cli.plan import diff, plan
from vlm_jax.cli.train import evaluate, train
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
  generate  --workdir W --image A.png --prompt "...": answer prompts with a run
            --checkpoint DIR --image A.png --prompt "...": answer them with a public checkpoint
  verify    --checkpoint DIR --reference FILE.npz: compare with the outputs of a reference
  export    --checkpoint DIR_OR_WORKDIR --output DIR: write a folder that transformers loads
  plan      --config FILE [--topology v5e:8x8 | --devices N]: predict the cost of a step
  diff      A.py B.py: print the fields in which two configs differ

help:
  python run.py COMMAND --config FILE --help        every field, with its value
  python run.py generate|verify|export --help       the options of these commands"""
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "verify": verify,
    "export": export,
    "plan": plan,
    "diff": diff,
}
COMMANDS_WITH_OWN_HELP = ("generate", "verify", "export")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: success. 1: a run failed. 2: a mistake of the user. 75: SIGTERM stopped a run, which the same
    command continues. 130: Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = "train", arguments
    if arguments and not arguments[0].startswith("-"):
        command, *rest = arguments
    try:
        if not arguments or (command not in COMMANDS_WITH_OWN_HELP and _asks_for_usage(rest)):
            print(USAGE)
            return 0 if arguments else 2
        if command not in COMMANDS:
            hint = nearest(command, COMMANDS)
            if command.endswith(".py"):
                hint = suggestion([f"--config {command}"])
            raise ConfigError(f"unknown command {command!r}{hint}: choose {', '.join(COMMANDS)}.")
        return COMMANDS[command](rest)
    except (UserError, RunError, OSError, KeyboardInterrupt) as error:
        code, message = describe_failure(error)
        print(message, file=sys.stderr)
        return code


def _asks_for_usage(arguments: list[str]) -> bool:
    """Returns whether --help is given without an experiment whose fields it could list."""
    names_experiment = any(argument.startswith(("--config", "--workdir")) for argument in arguments)
    return not names_experiment and bool({"-h", "--help"} & set(arguments))
