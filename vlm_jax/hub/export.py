"""A checkpoint, or a run of ours, -> a folder that transformers loads, with tokenizer and processor files along."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from vlm_jax.config import FUSION_STYLES, CheckpointError, Experiment, UserError
from vlm_jax.config.validate import flat
from vlm_jax.hub.families.family import Family, Json
from vlm_jax.hub.families.registry import KNOWN, family_of
from vlm_jax.hub.load import Checkpoint, load_checkpoint
from vlm_jax.hub.run_files import (
    PREPROCESSOR,
    PROCESSOR,
    TEXT_FILES,
    keeps_form,
    prompt_differences,
    reads_image_tokens,
    write_run_files,
)
from vlm_jax.hub.save import write_model
from vlm_jax.hub.tensors.folder import all_or_none, open_tensors, read_json
from vlm_jax.hub.text.tokenizer import GENERATION_CONFIG

COPIED_FILES = (*TEXT_FILES, GENERATION_CONFIG, PREPROCESSOR, PROCESSOR)  # copied as they are
V5_ONLY_KEYS = (
    "rope_parameters",
    "dtype",
    "transformers_version",
    "layer_types",
)  # spellings that 4.x does not know
NON_ARCHITECTURE_FIELDS = (
    "checkpoint",
    "unroll",
    "remat",
    "patch_embed",
    "image_mean",
    "image_std",
    "resize",
    "resize_px",
    "resample",
    "thumbnail",
    "tile_tags",
)  # equal numbers whatever they say
SHOWN_DIFFERENCES = 3  # of a run from its nearest family, in one line


def export_checkpoint(
    folder: str | os.PathLike, output: str | os.PathLike, taps: str | None = None
) -> str:
    """A public checkpoint under the names and config keys of transformers 4.x, byte for byte; returns its model_type.

    Raises:
      CheckpointError: the folder cannot be loaded, or the output cannot be written or holds weights already.
    """
    refuse_used(output)
    with all_or_none(
        output
    ) as stage:  # that it cannot be written is known before the weights are read
        checkpoint, params = load_checkpoint(folder, taps=taps)
        with open_tensors(folder) as tensors:
            dtypes = {name: tensor.dtype for name, tensor in checkpoint.stored(tensors).items()}
        write_checkpoint(stage, checkpoint, params, dtypes)
    return checkpoint.family.model_type


def write_checkpoint(
    output: str | os.PathLike, checkpoint: Checkpoint, params: Mapping, dtypes=None
) -> None:
    """Parameters in the layout of the checkpoint that they were loaded from, with the files beside its weights."""
    refuse_used(output)
    with all_or_none(output) as stage:
        write_model(
            stage, checkpoint.family, checkpoint.cfg, params, without_5x(checkpoint.config), dtypes
        )
        for name in COPIED_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copy(checkpoint.folder / name, stage / name)


def refuse_used(output: str | os.PathLike) -> None:
    if (Path(output).expanduser() / "config.json").exists():
        raise CheckpointError(
            f"--output {output} holds a config.json already: choose another folder, or delete it."
        )


def without_5x(config: Mapping) -> Json:
    """config.json without the keys that only transformers 5.x knows; their 4.x spellings stand beside them."""
    kept = {
        key: without_5x(x) if isinstance(x, dict) else x
        for key, x in config.items()
        if key not in V5_ONLY_KEYS
    }
    return kept | ({"torch_dtype": config["dtype"]} if "dtype" in config else {})


def export_run(
    cfg: Experiment,
    params: Mapping,
    tokenizer: Path,
    output: str | os.PathLike,
    taps: str | None = None,
    processor: Path | None = None,
) -> str:
    """Writes a run as a checkpoint of the public family that it is; returns the family's model_type.

    transformers' `AutoProcessor` and `generate` answer as the run does, but for `run_files.prompt_differences`. A
    Llama 3.2 Vision is spelt as transformers 5 reads it ("output"), unless `taps` names the other way.

    Args:
      tokenizer: tokenizer.json of the run.
      processor: the files of the checkpoint that the run began with, `Workdir.processor`.

    Raises:
      CheckpointError: no family is like it (the nearest is named, with what differs), or the output cannot be written.
    """
    refuse_used(output)
    family = matching_family(cfg, taps or "output")
    with all_or_none(output) as stage:
        ids = write_run_files(stage, cfg, family.model_type, tokenizer, processor)
        config = {"pad_token_id": ids.pad, "eos_token_id": ids.eos, "torch_dtype": "float32"}
        if ids.begin is not None:
            config |= {"bos_token_id": ids.begin, "decoder_start_token_id": ids.begin}
        if reads_image_tokens(cfg):
            config |= {
                "image_token_index": ids.image,
                "image_token_id": ids.image,
            }  # families read the one or the other
            cfg, params = with_embedding_row(cfg, params, ids.image)
        if keeps_form(cfg, processor):
            config = without_5x(read_json(processor / "config.json")) | {"torch_dtype": "float32"}
        write_model(stage, family, cfg, params, config)
    return family.model_type


def with_embedding_row(cfg: Experiment, params: Mapping, image: int) -> tuple[Experiment, Mapping]:
    """The model with a row of embedding and head for an image token beyond its vocabulary.

    The row is the mean of the others, so that its logit is never above the largest of theirs.
    """
    rows = cfg.decoder.vocab_size
    if image < rows + cfg.decoder.extra_tokens:
        return cfg, params
    grown = replace(cfg, decoder=replace(cfg.decoder, vocab_size=image + 1))
    flat, more = traverse_util.flatten_dict(params, sep="/"), image + 1 - rows
    for path, axis in {"decoder/embedding/table": 0, "decoder/free_head/kernel": 1}.items():
        if path in flat:
            table = np.asarray(jax.device_get(flat[path]))
            mean = table.mean(axis, keepdims=True, dtype=np.float32).astype(table.dtype)
            flat[path] = np.concatenate([table, *[mean] * more], axis)
    return grown, traverse_util.unflatten_dict(flat, sep="/")


def matching_family(cfg: Experiment, taps: str = "output", shown: int | None = None) -> Family:
    """The family whose config.json can say what this experiment is.

    Args:
      shown: how many of the nearest family's differences an error names; None: all.

    Raises:
      CheckpointError: there is none.
    """
    if cfg.fusion.splits_views:
        raise CheckpointError(
            f"fusion.kind {cfg.fusion.kind} cannot be exported: no public checkpoint is of that kind."
        )
    mine, nearest = architecture_fields(cfg), []
    for known in KNOWN:
        family = family_of({"model_type": known.model_type}, "", taps)
        try:
            again = family.read(family.write(cfg), {row.hub for row in family.rows(cfg)})
        except (UserError, KeyError, AttributeError, TypeError, ValueError):
            continue  # it has no words for such a model at all
        if not isinstance(again, Experiment):
            continue
        theirs = architecture_fields(again)
        differing = [
            f"{n} {mine.get(n)} (not {theirs.get(n)})"
            for n in mine | theirs
            if mine.get(n) != theirs.get(n)
        ]
        if not differing:
            return family
        nearest.append((len(differing), family.model_type, differing))
    if not nearest:
        raise CheckpointError("no public family is like this run.")
    count, name, differing = min(nearest)
    named = ", ".join(differing[:shown]) + (
        f" and {count - shown} more" if shown and count > shown else ""
    )
    raise CheckpointError(
        f"no public family is like this run; the nearest is {name}, but for {named}."
    )


def exportable(cfg: Experiment) -> str:
    """A sentence on the family as which a run of this experiment can be exported, or why there is none."""
    try:
        family = matching_family(cfg, shown=SHOWN_DIFFERENCES).model_type
    except UserError as error:
        return f"export: none, {str(error).rstrip('.')}"
    wrong = prompt_differences(cfg, family)
    if not wrong:
        return f"export: {family}"
    return f"export: {family}, but its processor in transformers writes other prompts than {' and '.join(wrong)}"


def architecture_fields(cfg: Experiment) -> dict[str, object]:
    """What the model is: settings that two equal models share, whatever way they were given."""
    decoder, fusion = cfg.decoder, cfg.fusion
    decoder = replace(decoder, kv_heads=decoder.num_kv_heads, head_dim=decoder.head_width)
    if decoder.positions != "rope":
        decoder = replace(decoder, rope=type(decoder.rope)())
    found = {f"decoder.{name}": value for name, value in flat(decoder).items()}
    # A copy of a style under another name is the same architecture.
    kind = next(kind for kind, style in FUSION_STYLES.items() if style == fusion.style)
    found |= {"fusion.kind": kind, "fusion.prefix": fusion.prefix}
    found["fusion.sublayers"] = fusion.sublayers(decoder.depth)
    if fusion.image_in_memory:
        found |= {"fusion.has_gates": fusion.has_gates, "fusion.qk_norm": fusion.qk_norm}
        found["fusion.tokens_without_image"] = fusion.tokens_without_image
    if fusion.has_images:
        vision = replace(
            cfg.vision, kv_heads=cfg.vision.num_kv_heads, head_dim=cfg.vision.head_width
        )
        found |= {f"vision.{name}": value for name, value in flat(vision).items()}
        found |= {f"projector.{name}": value for name, value in _used(cfg.projector).items()}
    return {
        name: value
        for name, value in found.items()
        if name.split(".")[1] not in NON_ARCHITECTURE_FIELDS
    }


def _used(projector) -> dict[str, object]:
    """The settings that its kind reads."""
    fields = {name: getattr(projector, name) for name in projector.spec.fields}
    return {"kind": projector.kind} | fields
