"""The front door: `python run.py [VERB] [--config FILE] [--any.field VALUE ...]`; `python run.py --help` says more."""

from vlm_jax.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
