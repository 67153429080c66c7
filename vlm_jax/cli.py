"""The command line: verbs, and mistakes as one sentence with exit code 2."""

import argparse
import dataclasses
import sys
from collections.abc import Callable

from vlm_jax import cli_hub, config_file
from vlm_jax.config import ConfigError, Experiment
from vlm_jax.validate import validate
from vlm_jax.workdir import Workdir

USAGE = """usage: python run.py [VERB] [--config FILE] [--any.field VALUE ...]

  train     (the default) trains the experiment of --config in its work folder and evaluates it;
            with --workdir of a run that was stopped, continues it
  eval      --workdir W [--eval.split ...]: evaluates a run again
  generate  --workdir W --image A.png [B.png ...] --prompt "..." ["..." ...]: asks every prompt about every image
  generate  --checkpoint DIR [--image A.png ...] --prompt "..." [--temperature T ...]: asks a public checkpoint
  verify    --checkpoint DIR --reference FILE.npz: compares a public checkpoint with a reference's outputs
  export    --checkpoint DIR_OR_WORKDIR --output DIR: writes a folder that transformers loads
  diff      A.py B.py: prints the fields in which two configs differ

python run.py VERB --config FILE --help lists every field with its value."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 where a run failed, 2 for a mistake of the user."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments == ["--help"] or arguments == ["-h"]:
            print(USAGE)
            return 0 if arguments else 2
        has_verb = not arguments[0].startswith("-")
        verb, rest = (arguments[0], arguments[1:]) if has_verb else ("train", arguments)
        if verb not in VERBS:
            raise ConfigError(f"{verb!r} is no verb{config_file.nearest(verb, VERBS)}: choose {', '.join(VERBS)}.")
        return VERBS[verb](rest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def experiment(verb: str, arguments: list[str], stored: bool) -> Experiment:
    """The experiment that the arguments ask for: of --config, or of the run in --workdir where `stored`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    given, fields = parser.parse_known_args(arguments)
    if given.workdir and (stored or not given.config):
        cfg = Workdir(given.workdir).read_config()
    elif given.config and not stored:
        cfg = config_file.load(given.config)
        cfg = dataclasses.replace(cfg, workdir=given.workdir) if given.workdir else cfg
    else:
        raise ConfigError(f"{verb} needs {'--workdir W, the folder of a run' if stored else '--config FILE'}.")
    cfg = config_file.override(cfg, fields, f"python run.py {verb}")
    if not stored and (cfg.vision.checkpoint or cfg.decoder.checkpoint):
        from vlm_jax.hub import compose

        cfg = compose.resolved(cfg)
    return validate(cfg)


def train(arguments: list[str]) -> int:
    cfg = experiment("train", arguments, stored=False)
    from vlm_jax.train import loop

    try:
        loop.train(cfg)
    except loop.NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return _evaluate(cfg)


def evaluate(arguments: list[str]) -> int:
    return _evaluate(experiment("eval", arguments, stored=True))


def _evaluate(cfg: Experiment) -> int:
    from vlm_jax.infer import demo, evaluate

    scores = evaluate.evaluate(cfg, *demo.load(cfg))
    workdir = Workdir(cfg.workdir)
    print(
        f"exact match {scores['exact_match']:.4f} on {scores['examples']} questions of {scores['split']}, "
        f"{scores['image_shuffled_exact_match']:.4f} with shuffled images\n"
        f"pictures: {workdir.samples}   scores: {workdir.eval}   every answer: {workdir.predictions}"
    )
    return 0


def generate(arguments: list[str]) -> int:
    if any(argument.split("=")[0] == "--checkpoint" for argument in arguments):
        return cli_hub.generate(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--image", nargs="+", action="extend", default=[])
    parser.add_argument("--prompt", nargs="+", action="extend", default=[])
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"generate: {error}.") from None
    cfg = experiment("generate", rest, stored=True)
    if not given.image or not given.prompt:
        raise ConfigError('generate needs --image FILE [FILE ...] and --prompt "TEXT" ["TEXT" ...].')
    from vlm_jax.infer import demo

    for image, prompt, answer in demo.ask(cfg, given.image, given.prompt):
        print(f"{image}  {prompt}  {answer}")
    return 0


def diff(arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise ConfigError("diff needs two config files: python run.py diff A.py B.py.")
    lines = config_file.differences(*map(config_file.load, arguments))
    print("\n".join(lines) if lines else "the two configs are equal")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "verify": cli_hub.verify,
    "export": cli_hub.export,
    "diff": diff,
}
