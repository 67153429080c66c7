"""Calls of the command line in this process."""

from pathlib import Path

from vlm_jax.cli.main import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "easy_vqa" / "unified.py")


def run(arguments, capsys):
    """Returns (exit code, stdout, stderr); tyro's help ends the program on its own."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err
