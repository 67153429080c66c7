"""The command line: `vlm-jax`, `python -m vlm_jax` and `python run.py`."""

from vlm_jax.runtime.process import prepare_process


def main() -> int:
    """Runs one command in a prepared process; returns the exit code."""
    # Before the imports below, because it may start the program again.
    prepare_process()

    from vlm_jax.cli import main as cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
