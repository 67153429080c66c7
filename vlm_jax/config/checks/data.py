"""Settings of data that are refused together, each in a sentence that names the fields."""

import dataclasses
from collections.abc import Sequence

from vlm_jax.config import (
    ConfigError,
    Experiment,
    naming_source,
)
from vlm_jax.config.bounds import AT_LEAST, AT_MOST
from vlm_jax.config.checks.common import NAME, NAME_CHARACTERS, is_changed
from vlm_jax.config.datasets import (
    AUTO,
    CONVERSATION_FORMATS,
    restricted_fields,
    sources_that_read,
)
from vlm_jax.config.hints import nearest

LEAST_WEIGHT = 1e-6  # of a source of a mixture, relative to the largest


def _mixture(cfg: Experiment) -> None:
    """Checks names, weights and kinds of the sources; `validate` checks the data of each."""
    mixture, temperature = cfg.data.mixture, cfg.data.mixture_temperature
    _evaluated_source(cfg)
    if not mixture:
        if temperature is not None:
            raise ConfigError(
                f"data.mixture_temperature {temperature} has no effect without data.mixture: leave "
                "it out."
            )
        return
    names = [source.name for source in mixture]
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(f"data.mixture {name!r} is not a name: {NAME_CHARACTERS}.")
        if names.count(name) > 1:
            raise ConfigError(f"data.mixture names {name} twice: choose another name.")
    _weights(cfg)
    kinds = {}
    for source in mixture:
        with naming_source(source.name):
            dataset = cfg.data.part(source).dataset
        kinds.setdefault(dataset.conversations is None, source.name)
    if len(kinds) > 1:
        parts = cfg.data.parts
        raise ConfigError(
            f"data.mixture {kinds[True]} (data.source {parts[kinds[True]].source}) has rows of one "
            f"image with its questions, and {kinds[False]} (data.source "
            f"{parts[kinds[False]].source}) packed conversations: mix sources of one kind."
        )
    read = {name for part in cfg.data.parts.values() for name in part.dataset.fields}
    for name in sorted(restricted_fields() - read):
        if is_changed(cfg.data, name):
            raise ConfigError(
                f"data.{name} applies only to data.source "
                f"{' and '.join(sources_that_read(name))}, which no source of data.mixture is: "
                "leave it out."
            )


def _evaluated_source(cfg: Experiment) -> None:
    source, names = cfg.eval.source, [part.name for part in cfg.data.mixture]
    if not source or source in names:
        return
    if not names:
        raise ConfigError(f"eval.source {source} has no effect without data.mixture: leave it out.")
    raise ConfigError(
        f"eval.source {source!r} is not a source of data.mixture{nearest(source, names)}: choose "
        f"{', '.join(names)}."
    )


def _weights(cfg: Experiment) -> None:
    weights = {source.name: source.weight for source in cfg.data.mixture}
    missing = [name for name, weight in weights.items() if weight is None]
    if len(missing) == len(weights):
        return
    if missing:
        raise ConfigError(
            f"data.mixture {missing[0]} has no weight, but other sources have: give every source a "
            "weight, or none of them (data.mixture_temperature)."
        )
    if cfg.data.mixture_temperature is not None:
        raise ConfigError(
            f"data.mixture_temperature {cfg.data.mixture_temperature} and the weights of "
            "data.mixture both set the shares of the sources: leave one out."
        )
    for name, weight in weights.items():
        if weight <= 0:
            raise ConfigError(f"data.mixture {name} has the weight {weight}: it must be above 0.")
        if weight < LEAST_WEIGHT * max(weights.values()):
            raise ConfigError(
                f"data.mixture {name} has the weight {weight}, less than a millionth of "
                f"{max(weights.values())}, the largest: leave the source out."
            )


def _data(cfg: Experiment) -> None:
    data, dataset = cfg.data, cfg.data.dataset
    if "files" not in dataset.fields and cfg.eval.files:
        raise ConfigError(_unread("eval.files", sources_that_read("files"), data.source))
    if data.mixture:
        return
    for name in (field.name for field in dataclasses.fields(data)):
        sources = sources_that_read(name)
        if sources and name not in dataset.fields and is_changed(data, name):
            raise ConfigError(_unread(f"data.{name}", sources, data.source))
    if "files" not in dataset.fields and is_changed(cfg.eval, "turns"):
        raise ConfigError(_unread("eval.turns", sources_that_read("files"), data.source))
    if "files" in dataset.fields and not data.files:
        raise ConfigError(
            f"data.source {data.source} needs data.files: conversations in one of the forms "
            f"{', '.join(CONVERSATION_FORMATS)}."
        )
    for name, files in (("data.files", data.files), ("eval.files", cfg.eval.files)):
        repeated = [file for i, file in enumerate(files) if file in files[:i]]
        if repeated:
            raise ConfigError(
                f"{name} has {repeated[0]} twice: to read it more often than other files, give it "
                "a weight in data.mixture."
            )
    if data.format not in (AUTO, *CONVERSATION_FORMATS):
        raise ConfigError(
            f"data.format {data.format!r} is unknown{nearest(data.format, CONVERSATION_FORMATS)}: "
            f"choose one of {', '.join((AUTO, *CONVERSATION_FORMATS))}."
        )
    if data.augment and not dataset.allows_augment:
        raise ConfigError(
            f"data.augment {' '.join(data.augment)} would invalidate the answers of data.source "
            f"{data.source}: leave it empty."
        )
    if (
        data.is_conversations
        and cfg.fusion.tokens_without_image == "attend_all"
        and not cfg.vision.keeps_aspect_in_tiles
    ):
        raise ConfigError(
            "fusion.tokens_without_image attend_all leaks images between the conversations of a "
            f"row: set it to mask_out for data.source {data.source}."
        )


def _unread(field: str, sources: Sequence[str], source: str) -> str:
    return (
        f"{field} applies only to data.source {' and '.join(sources)}, not to {source}: "
        "leave it out."
    )


def _synthetic(cfg: Experiment) -> None:
    data = cfg.data
    if data.transcript and data.cell_px is None and "cell_px" in data.dataset.fields:
        raise ConfigError(
            "data.transcript True does not contain the sizes of words, which are asked for on "
            f"pages that are not typewritten: set data.cell_px to {AT_LEAST['data.cell_px']} to "
            f"{AT_MOST['data.cell_px']}, or data.transcript to False."
        )
    if min(data.images) < 1:
        raise ConfigError(
            f"data.images is {' '.join(map(str, data.images))}: train, validation and test need at "
            "least 1 image each."
        )


def _tokens(cfg: Experiment) -> None:
    data, decoder, tags = cfg.data, cfg.decoder, sum(cfg.data.tag_ids, ())
    if decoder.extra_tokens and decoder.added_tokens:
        raise ConfigError(
            f"decoder.extra_tokens {decoder.extra_tokens} and decoder.added_tokens "
            f"{decoder.added_tokens} both name the ids after decoder.vocab_size: leave one out."
        )
    bos = () if data.bos_id is None else (data.bos_id,)
    for name, ids in (("special_ids", data.special_ids), ("tag_ids", tags), ("bos_id", bos)):
        outside = [i for i in ids if not 0 <= i < decoder.num_ids]
        if outside:
            raise ConfigError(
                f"data.{name} {outside[0]} is not a token: choose ids of 0 to "
                f"{decoder.num_ids - 1} ({_vocabulary(cfg, 'added_tokens', 'extra_tokens')})."
            )
    if data.eos_id >= decoder.num_logits:
        raise ConfigError(
            f"data.special_ids ends in {data.eos_id}, the end of text, which the decoder must be "
            f"able to generate: choose an id of 0 to {decoder.num_logits - 1} "
            f"({_vocabulary(cfg, 'added_tokens')})."
        )
    both = [i for i in tags if i in data.special_ids]
    if both:
        raise ConfigError(
            f"data.tag_ids {both[0]} is also in data.special_ids: choose ids without another "
            "meaning."
        )


def _vocabulary(cfg: Experiment, *others: str) -> str:
    """Lists decoder.vocab_size and the other fields that add ids, for a message."""
    names = ["vocab_size", *(name for name in others if getattr(cfg.decoder, name))]
    return " and ".join(f"decoder.{name} {getattr(cfg.decoder, name)}" for name in names)


CHECKS = (_mixture, _data, _synthetic, _tokens)
