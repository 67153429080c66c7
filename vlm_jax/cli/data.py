"""The command `data`: what a run will be trained on."""

import contextlib
import json
import os
import sys
from pathlib import Path

from vlm_jax.cli.experiment import parse_experiment
from vlm_jax.cli.options import FILE, Parser
from vlm_jax.config import ConfigError

DATA = """examples:
  python run.py data --config configs/easy_vqa/unified.py
  python run.py data --checkpoint checkpoints/gpt2 --data.files train.json --rows 20
  python run.py data --config configs/easy_vqa/unified.py --json

Prints counts of the training split, and writes data.html: rows of the first batches with their
images, tokens, scored tokens, segments and masks. Builds no model. The fields of the experiment are
options too. This command lists them:
  python run.py data --config FILE --help"""
DEFAULT_ROWS = 8
DATA_OPTIONS = {
    "rows": {
        "type": int,
        "metavar": "N",
        "help": f"rows of the page (default: {DEFAULT_ROWS}); with --json, examples to print "
        "(default: all)",
    },
    "out": {"metavar": FILE, "help": "the page (default: data.html in this folder)"},
    "json": {
        "action": "store_true",
        "help": "print each example before packing as a line of JSON, and write no page",
    },
}


def data(arguments: list[str]) -> int:
    """Prints counts of the training data and writes its page, or prints its examples as JSON."""
    parser = Parser(add_help=False)
    for name, settings in DATA_OPTIONS.items():
        parser.add_argument(f"--{name}", **settings)
    args, rest = parser.parse_known_args(arguments)
    help_texts = {name: settings["help"] for name, settings in DATA_OPTIONS.items()}
    if args.rows is not None and args.rows < 1:
        raise ConfigError(f"--rows is {args.rows}: it must be at least 1.")
    if args.json and args.out is not None:
        raise ConfigError("--json writes no page: leave out --out.")
    # Only the lines of JSON belong to the standard output.
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if args.json else output):
        cfg = parse_experiment("data", rest, stored=False, options=help_texts)
        import jax

        # The page needs no accelerator, which may be busy with a run.
        jax.config.update("jax_platforms", "cpu")
        from vlm_jax.infer.data_page import counts, examples, page
        from vlm_jax.train.initial import load_tokenizer

        path = Path(os.path.expanduser("data.html" if args.out is None else args.out))
        if not args.json:
            page.check_path(path)
        tokenizer = load_tokenizer(cfg)
        if args.json:
            for example in examples.read(cfg, tokenizer, args.rows):
                print(json.dumps(example.as_json(), ensure_ascii=False), file=output)
            return 0
        result = counts.count(cfg, tokenizer, examples.read(cfg, tokenizer))
        print(counts.format_counts(result))
        rows = page.read_rows(cfg, tokenizer, args.rows or DEFAULT_ROWS)
        print(page.describe_padding(rows))
        page.write(path, cfg, result, rows)
        print(f"rows with their images and tokens: {path}")
    return 0
