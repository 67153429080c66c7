"""The commands `train` and `eval`."""

import contextlib
import os
import sys
from collections.abc import Iterator

from vlm_jax.cli.experiment import is_checkpoint, parse_checkpoint_evaluation, parse_experiment
from vlm_jax.cli.failures import describe_failure
from vlm_jax.cli.options import FOLDER, STEP, Parser
from vlm_jax.config import ConfigError, Experiment, RunError
from vlm_jax.runtime import preemption
from vlm_jax.runtime.process import exit_now
from vlm_jax.runtime.workdir import Workdir

TRAIN = """examples:
  python run.py train --config configs/easy_vqa/unified.py --workdir runs/mine
  python run.py train --workdir runs/mine
  python run.py train --checkpoint checkpoints/gpt2 --data.files train.json

Trains an experiment and evaluates it; --workdir alone continues a run that was stopped. The fields
of the experiment are options too. These commands list them:
  python run.py train --config FILE --help
  python run.py train --checkpoint DIR --help"""
EVAL = """examples:
  python run.py eval --workdir runs/mine --eval.max_examples 500
  python run.py eval --checkpoint checkpoints/gpt2 --data.files test.json

Evaluates a run again, into a folder of its work folder, or a checkpoint before any training. The
fields of the experiment are options too. These commands list them:
  python run.py eval --workdir DIR --help
  python run.py eval --checkpoint DIR --help"""
EVAL_OPTIONS = {
    "workdir": {
        "metavar": FOLDER,
        "help": "work folder of the run; with --checkpoint, of the evaluation",
    },
    "checkpoint": {
        "metavar": FOLDER,
        "help": "public checkpoint to evaluate; --init_from is the same option",
    },
    "step": STEP,
}


def train(arguments: list[str]) -> int:
    """Trains the experiment of --config, or continues the run in --workdir, and evaluates it."""
    with preemption.handler(preemption.leave_at_once):
        cfg = parse_experiment("train", arguments, stored=False)
        from vlm_jax.infer.validation import prepare_scores
        from vlm_jax.runtime import distributed
        from vlm_jax.train import loop

    try:
        with preemption.handler(preemption.stop_at_once):
            distributed.start(cfg)
            enable_compilation_cache(cfg)
            with _end_together():
                loop.train(cfg, prepare_scores)
                return _evaluate(cfg)
    except (RunError, preemption.Preempted) as error:
        preemption.ignore()
        code, message = describe_failure(error)
        print(message, file=sys.stderr)
        if not error.on_all_processes:
            exit_now(code)
        return code


def evaluate(arguments: list[str]) -> int:
    """Evaluates the run in --workdir, or a checkpoint before any training."""
    parser = Parser(add_help=False)
    parser.add_argument("--step", **STEP)
    args, arguments = parser.parse_known_args(arguments)
    if is_checkpoint(arguments):
        if args.step is not None:
            raise ConfigError("--step is for the run in --workdir, not for --checkpoint.")
        cfg = parse_checkpoint_evaluation(arguments)
    else:
        options = {"step": STEP["help"]}
        cfg = parse_experiment("eval", arguments, stored=True, options=options)
    from vlm_jax.runtime import distributed

    distributed.start(cfg)
    with _end_together():
        return _evaluate(cfg, is_later=True, step=args.step)


def enable_compilation_cache(cfg: Experiment) -> None:
    """Keeps compiled programs on disk, so that the next start compiles none of them again.

    The environment variable of JAX goes before `train.compilation_cache_dir`.
    """
    import jax

    if cfg.train.compilation_cache_dir and not jax.config.jax_compilation_cache_dir:
        folder = os.path.expanduser(cfg.train.compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", folder)
        # A start compiles many small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def _end_together() -> Iterator[None]:
    """Ends all processes of a run if one of them fails alone, because the others would wait."""
    from vlm_jax.runtime import distributed

    try:
        yield
        distributed.finish()
    except (Exception, KeyboardInterrupt) as error:
        if distributed.is_alone(error):
            preemption.ignore()
            distributed.leave_alone(*describe_failure(error))
        raise


def _evaluate(cfg: Experiment, is_later: bool = False, step: str | None = None) -> int:
    """Evaluates a checkpoint, by default the last one, and prints its scores.

    The evaluation after the training is written to the work folder, a later one to a folder below.
    """
    if not cfg.eval.read_split:
        if is_later:
            raise ConfigError(
                "eval.split is empty, so there is nothing to evaluate: choose one, such as "
                "--eval.split test."
            )
        print("eval.split is empty: nothing to evaluate")
        return 0
    from vlm_jax.data import pipeline
    from vlm_jax.infer import evaluate, run

    folder = Workdir(cfg.workdir)
    if folder.config.exists():
        params, tokenizer, step = run.load_with_step(cfg, step)
    else:
        params, tokenizer, step = run.load_untrained(cfg)
    if is_later:
        folder = folder.later_evaluation(cfg, step, pipeline.fingerprint(cfg.eval_data))
    scores = evaluate.evaluate(cfg, params, tokenizer, step, folder)
    for line in evaluate.describe_scores(scores, cfg.eval.title):
        print(line)
    print(
        f"pictures: {folder.samples}   scores: {folder.eval}   every answer: {folder.predictions}"
    )
    return 0
