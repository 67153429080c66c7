"""Prepares the conversations of a config before any training; Apache Beam's workers read the image files.

    python -m vlm_jax.data.prepare --config FILE [--any.field VALUE ...] [-- --runner=R ...]

What stands behind -- are options of Beam. Needs requirements-beam.txt. The dataset is the one that a training would
make for itself, and finds.
"""

import argparse
import logging
import sys

import tensorflow_datasets as tfds

from vlm_jax.config import ConfigError, Experiment, UserError, files
from vlm_jax.config.validate import validate
from vlm_jax.data import conversations


def prepare(cfg: Experiment, beam_options: list[str]) -> conversations.Conversations:
    """The conversations of `data.train_split`, prepared.

    Raises:
      ConfigError: `data.source` is another, or a file is bad or missing.
    """
    if cfg.data.source != "conversations":
        raise ConfigError(
            f"data.source {cfg.data.source} needs no Beam: a training prepares it. Here: conversations."
        )
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ConfigError(
            "Apache Beam is not installed: pip install -r requirements-beam.txt."
        ) from None
    how = tfds.download.DownloadConfig(beam_options=PipelineOptions(beam_options))
    logging.getLogger("apache_beam").setLevel(
        logging.CRITICAL
    )  # a worker's error is raised here, too
    kind = conversations.ConversationImagesOnBeam
    return conversations.load(cfg.data, cfg.data.train_split, kind, how)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.data.prepare", description=__doc__)
    parser.add_argument("--config", required=True)
    given, fields = parser.parse_known_args(arguments[:end])
    try:
        cfg = files.override(files.load(given.config), fields, parser.prog)
        found = prepare(validate(cfg), arguments[end + 1 :])
    except UserError as error:
        message = str(error).partition(" [while running")[0]  # Beam appends the step
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"{len(found)} conversations are prepared in {cfg.data.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
