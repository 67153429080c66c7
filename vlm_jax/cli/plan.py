"""Commands about configs, which train nothing: `plan` and `diff`."""

import argparse
import json

from vlm_jax.cli.experiment import parse_experiment
from vlm_jax.cli.options import Parser
from vlm_jax.config import ConfigError, files

PLAN = """examples:
  python run.py plan --config configs/tpu/llava_1_5_7b_stage_2.py --devices 64
  python run.py plan --config configs/tpu/llava_1_5_7b_stage_2.py --topology v5e:8x8
  python run.py plan --checkpoint checkpoints/gpt2 --data.files train.json --json

Predicts the FLOPs, the memory and the time of a training step, and trains nothing. The fields of
the experiment are options too. These commands list them:
  python run.py plan --config FILE --help
  python run.py plan --checkpoint DIR --help"""
DIFF = """example:
  python run.py diff configs/easy_vqa/unified.py configs/easy_vqa/cross_attention.py

Prints the fields in which two configs differ. This command lists all fields:
  python run.py train --config FILE --help"""
PLAN_OPTIONS = {
    "topology": {
        "metavar": "SLICE",
        "help": "TPU slice, CHIP:LAYOUT such as v5e:8x8; the step is compiled for it",
    },
    "no-compile": {
        "action": "store_true",
        "help": "with --topology: only what is predicted for the slice, in seconds",
    },
    "devices": {
        "type": int,
        "metavar": "N",
        "help": "instead of --topology: number of devices, of any kind (default: 1)",
    },
    "json": {"action": "store_true", "help": "print the plan as JSON"},
}


def plan(arguments: list[str]) -> int:
    """Prints what a training step will cost, before any of it runs."""
    parser = Parser(add_help=False)
    for name, settings in PLAN_OPTIONS.items():
        parser.add_argument(f"--{name}", **settings)
    args, rest = parser.parse_known_args(arguments)
    help_texts = {name: settings["help"] for name, settings in PLAN_OPTIONS.items()}
    cfg = parse_experiment("plan", rest, stored=False, options=help_texts)
    _check_plan_options(args)
    from vlm_jax.plan.document import build_plan
    from vlm_jax.plan.table import format_plan

    plan = build_plan(cfg, args.topology, args.devices or 1, not args.no_compile)
    print(json.dumps(plan, indent=1) if args.json else format_plan(cfg, plan))
    return 0


def _check_plan_options(args: argparse.Namespace) -> None:
    if args.devices is not None and args.devices < 1:
        raise ConfigError(f"--devices is {args.devices}: it must be at least 1.")
    if args.topology is None and args.no_compile:
        raise ConfigError("--no-compile needs --topology, such as v5e:8x8.")
    if args.topology is not None and args.devices is not None:
        raise ConfigError("--topology and --devices both set the device count: choose one.")


def diff(arguments: list[str]) -> int:
    """Prints the fields in which two configs differ."""
    if len(arguments) != 2:
        raise ConfigError("diff needs two config files: python run.py diff A.py B.py.")
    lines = files.differences(*map(files.load, arguments))
    print("\n".join(lines) if lines else "the two configs are equal")
    return 0
