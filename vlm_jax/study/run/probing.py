"""Other questions for a finished run: `python -m vlm_jax.study.run.probing EXPERIMENT.json`.

The experiment starts from the run, has its parameters alone, and is not trained. Its work folder
gets the scores and the answers.
"""

import sys
from pathlib import Path

from vlm_jax.cli.train import enable_compilation_cache
from vlm_jax.config import UserError, files
from vlm_jax.infer import evaluate, run
from vlm_jax.runtime.workdir import EvaluationFolder


def main(config: str) -> int:
    cfg = files.from_json(Path(config).read_text(), config)
    enable_compilation_cache(cfg)
    try:
        params, tokenizer, _ = run.load_untrained(cfg)
        scores = evaluate.evaluate(
            cfg, params, tokenizer, folder=EvaluationFolder(Path(cfg.workdir))
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in evaluate.describe_scores(scores, cfg.eval.title):
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
