"""Prepares the conversations of a config before training; Apache Beam's workers read the images.

    python -m vlm_jax.data.prepare --config FILE [--any.field VALUE ...] [-- --runner=R ...]

Arguments after -- are passed to Beam. Needs requirements-beam.txt. Training would prepare the same
dataset itself; it finds it prepared.
"""

import argparse
import logging
import sys

import tensorflow_datasets as tfds

from vlm_jax.config import ConfigError, Data, Experiment, UserError, files, naming_source
from vlm_jax.config.validate import validate
from vlm_jax.data import conversations
from vlm_jax.data.builders.conversations import ConversationImagesOnBeam


def prepare(cfg: Experiment, beam_options: list[str]) -> int:
    """Prepares the conversations of `data.train_split` and returns their number.

    Raises:
      ConfigError: the dataset is not read from `data.files`, or Beam is not installed.
      DataError: a file is malformed or missing.
    """
    for name, data in cfg.data.parts.items():
        with naming_source(name):
            _check(data)
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ConfigError(
            "Apache Beam is not installed: pip install -r requirements-beam.txt."
        ) from None
    download_config = tfds.download.DownloadConfig(beam_options=PipelineOptions(beam_options))
    # Beam logs an error of a worker that is raised here as well.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    count = 0
    for name, data in cfg.data.parts.items():
        with naming_source(name):
            builder = ConversationImagesOnBeam
            count += len(conversations.load(data, data.train_split, builder, download_config))
    return count


def _check(data: Data) -> None:
    if not data.files:
        raise ConfigError(
            f"data.source {data.source} needs no Beam: training prepares it. "
            "This command prepares data.source conversations."
        )
    if data.unreadable_images == "skip":
        raise ConfigError(
            "data.unreadable_images skip does not work on Beam: set it to error, or let training "
            "prepare the dataset."
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    beam_options = arguments[end + 1 :]
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.data.prepare", description=__doc__)
    parser.add_argument("--config", required=True)
    args, fields = parser.parse_known_args(arguments[:end])
    try:
        cfg = files.override(files.load(args.config), fields, parser.prog)
        count = prepare(validate(cfg), beam_options)
    except UserError as error:
        message = str(error).partition(" [while running")[0]  # Beam appends the step
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"{count} conversations are prepared in {cfg.data.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
