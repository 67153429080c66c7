"""Command line of vlm_jax: `python run.py [COMMAND] [--config FILE] [--section.field VALUE ...]`.

`python run.py --help` lists the commands.
"""

from vlm_jax.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
