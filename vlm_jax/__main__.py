"""The command line: `vlm-jax`, `python -m vlm_jax` and `python run.py`."""

from vlm_jax.runtime.process import prepare_process


def main() -> int:
    """Runs one command in a prepared process; returns the exit code."""
    prepare_process()  # before the imports below: it may start the program again

    from vlm_jax.cli import commands

    return commands.main()


if __name__ == "__main__":
    raise SystemExit(main())
