"""The front door: `python run.py [VERB] [--config FILE] [--any.field VALUE ...]`; `python run.py --help` says more."""

from vlm_jax.start import prepare_process

if __name__ == "__main__":
    prepare_process()

    from vlm_jax.cli import main

    raise SystemExit(main())
