"""Controlled comparisons: `python experiments/study.py [run|report|list] ...`; see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vlm_jax.runtime.process import prepare_process  # noqa: E402

if __name__ == "__main__":
    prepare_process()

    from vlm_jax.study.cli import main

    raise SystemExit(main())
