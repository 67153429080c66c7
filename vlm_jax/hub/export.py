"""Exports checkpoints and runs to folders that transformers loads, processor files included.

`save.py` writes the config and the weights; this module chooses the family and the files beside
them.
"""

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
from vlm_jax.hub.families.registry import KNOWN, find_family
from vlm_jax.hub.load import Checkpoint, load_checkpoint
from vlm_jax.hub.pretrained_parts import processor_source
from vlm_jax.hub.run_files import (
    PREPROCESSOR,
    PROCESSOR,
    TEXT_FILES,
    has_image_placeholder,
    keeps_prompt_format,
    prompt_differences,
    write_run_files,
)
from vlm_jax.hub.save import write_model
from vlm_jax.hub.tensors.folder import all_or_none, open_tensors, read_json
from vlm_jax.hub.text.tokenizer import GENERATION_CONFIG

COPIED_FILES = (*TEXT_FILES, GENERATION_CONFIG, PREPROCESSOR, PROCESSOR)
# Keys of config.json that transformers 4.x does not know.
V5_ONLY_KEYS = ("rope_parameters", "dtype", "transformers_version", "layer_types")
# Fields that do not change the outputs for the same input arrays.
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
    "rgb_conversion",
    "thumbnail",
    "tile_tags",
)
MAX_LISTED_DIFFERENCES = 3  # from the closest family, in one line


def export_checkpoint(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    intermediate_layers: str | None = None,
    adapter: str | os.PathLike | None = None,
) -> str:
    """Exports a public checkpoint in the layout of transformers 4.x; tensors keep their bytes.

    Args:
      adapter: folder of a PEFT adapter, which is merged into the tensors.

    Returns:
      its model_type.

    Raises:
      CheckpointError: the folder cannot be loaded, or the output cannot be written or holds weights
        already.
    """
    refuse_used(output)
    # Opening the output first: an unwritable folder is reported before the weights are loaded.
    with all_or_none(output) as stage:
        checkpoint, params = load_checkpoint(
            folder, intermediate_layers=intermediate_layers, adapter=adapter
        )
        with open_tensors(folder) as tensors:
            dtypes = {name: tensor.dtype for name, tensor in checkpoint.stored(tensors).items()}
        write_checkpoint(stage, checkpoint, params, dtypes)
    return checkpoint.family.model_type


def write_checkpoint(
    output: str | os.PathLike, checkpoint: Checkpoint, params: Mapping, dtypes=None
) -> None:
    """Writes parameters in the layout of their checkpoint, with the files beside its weights."""
    refuse_used(output)
    with all_or_none(output) as stage:
        config = without_v5_keys(checkpoint.config)
        write_model(stage, checkpoint.family, checkpoint.cfg, params, config, dtypes)
        for name in COPIED_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copy(checkpoint.folder / name, stage / name)


def refuse_used(output: str | os.PathLike) -> None:
    """Raises CheckpointError if the folder holds a config.json."""
    if (Path(os.path.expanduser(output)) / "config.json").exists():
        raise CheckpointError(
            f"--output {output} holds a config.json already: choose another folder, or delete it."
        )


def without_v5_keys(config: Mapping) -> Json:
    """Drops the keys that only transformers 5.x knows; the family writes their 4.x spellings."""
    v4_config = {}
    for key, value in config.items():
        if key not in V5_ONLY_KEYS:
            v4_config[key] = without_v5_keys(value) if isinstance(value, dict) else value
    if "dtype" in config:
        v4_config["torch_dtype"] = config["dtype"]
    return v4_config


def export_run(
    cfg: Experiment,
    params: Mapping,
    tokenizer: Path,
    output: str | os.PathLike,
    intermediate_layers: str | None = None,
    processor: Path | None = None,
) -> str:
    """Writes a run as a checkpoint of the public family that has its architecture.

    `AutoProcessor` and `generate` of transformers answer as the run does, except for
    `run_files.prompt_differences`. A Llama 3.2 Vision is written as transformers 5 loads it
    ("output"), unless `intermediate_layers` names the other convention.

    Args:
      tokenizer: tokenizer.json of the run.
      processor: the processor files of the checkpoint that the run started from,
        `Workdir.processor`. If several families have this architecture, that checkpoint's is
        written.

    Returns:
      the family's model_type.

    Raises:
      CheckpointError: no family has this architecture (the message names the closest and the
        differences), or the output cannot be written.
    """
    refuse_used(output)
    family = matching_family(cfg, intermediate_layers or "output", base=processor)
    with all_or_none(output) as stage:
        ids = write_run_files(stage, cfg, family, tokenizer, processor)
        config = {"pad_token_id": ids.pad, "eos_token_id": ids.eos, "torch_dtype": "float32"}
        if ids.bos is not None:
            config |= {"bos_token_id": ids.bos, "decoder_start_token_id": ids.bos}
        if has_image_placeholder(cfg):
            # Families read one of the two keys.
            config |= {"image_token_index": ids.image, "image_token_id": ids.image}
            cfg, params = with_embedding_row(cfg, params, ids.image)
        if keeps_prompt_format(cfg, processor):
            stored = read_json(processor / "config.json")
            # A text decoder's config is not the config of a model that takes images.
            if stored.get("model_type") == family.model_type:
                config = without_v5_keys(stored) | {"torch_dtype": "float32"}
        write_model(stage, family, cfg, params, config)
    return family.model_type


def with_embedding_row(cfg: Experiment, params: Mapping, image: int) -> tuple[Experiment, Mapping]:
    """Adds rows to embedding and output head if the image token is beyond the vocabulary.

    The new rows are the mean of the others, so that their logit is never the largest.
    """
    decoder = cfg.decoder
    if image < decoder.num_ids:
        return cfg, params
    field, paths = "vocab_size", {"decoder/embedding/table": 0, "decoder/free_head/kernel": 1}
    if decoder.added_tokens:
        field = "added_tokens"
        paths = {"decoder/added_embedding/table": 0, "decoder/added_head/kernel": 1}
    added = image + 1 - decoder.num_logits
    size = getattr(decoder, field) + added
    grown = replace(cfg, decoder=replace(decoder, **{field: size}))
    flat_params = traverse_util.flatten_dict(params, sep="/")
    for path, axis in paths.items():
        if path in flat_params:
            table = np.asarray(jax.device_get(flat_params[path]))
            mean = table.mean(axis, keepdims=True, dtype=np.float32).astype(table.dtype)
            flat_params[path] = np.concatenate([table, np.repeat(mean, added, axis)], axis)
    return grown, traverse_util.unflatten_dict(flat_params, sep="/")


def matching_family(
    cfg: Experiment,
    intermediate_layers: str = "output",
    max_differences: int | None = None,
    base: Path | None = None,
) -> Family:
    """Returns the family whose config.json can express this experiment's architecture.

    Args:
      max_differences: number of the closest family's differences that an error lists; None: all.
      base: folder with the config.json of a checkpoint, whose family is chosen if several can.

    Raises:
      CheckpointError: no family can.
    """
    if cfg.fusion.splits_views:
        raise CheckpointError(
            f"fusion.kind {cfg.fusion.kind} cannot be exported: no public checkpoint has that "
            "architecture."
        )
    fields = architecture_fields(cfg)
    preferred, candidates = _model_type(base), []
    for known in sorted(KNOWN, key=lambda family: family.model_type != preferred):
        family = find_family({"model_type": known.model_type}, "", intermediate_layers)
        written = _as_written(family, cfg)
        if written is None:
            continue
        differences = _differences(fields, architecture_fields(written))
        if not differences:
            return family
        candidates.append((len(differences), family.model_type, differences))
    if not candidates:
        raise CheckpointError("this run matches no supported architecture.")
    count, name, differences = min(candidates)
    listed = ", ".join(differences[:max_differences])
    if max_differences is not None and count > max_differences:
        listed += f" and {count - max_differences} more"
    raise CheckpointError(
        f"this run matches no supported architecture; the closest is {name}, which differs in "
        f"{listed}."
    )


def _model_type(folder: Path | None) -> str | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    return read_json(folder / "config.json").get("model_type")


def _as_written(family: Family, cfg: Experiment) -> Experiment | None:
    """Returns what the family's config.json of `cfg` describes; None: it cannot be written."""
    try:
        names = {row.tensor for row in family.param_table(cfg)}
        written = family.config_from_hf(family.config_to_hf(cfg), names)
    except (UserError, KeyError, AttributeError, TypeError, ValueError):
        return None
    return written if isinstance(written, Experiment) else None


def _differences(fields: Mapping, others: Mapping) -> list[str]:
    return [
        f"{name} {fields.get(name)} (not {others.get(name)})"
        for name in fields | others
        if fields.get(name) != others.get(name)
    ]


def is_exportable(cfg: Experiment) -> bool:
    """Returns whether a family has the experiment's architecture."""
    try:
        matching_family(cfg)
    except UserError:
        return False
    return True


def exportable(cfg: Experiment) -> str:
    """Returns a line with the family that the experiment exports to, or why none matches."""
    try:
        family = matching_family(
            cfg, max_differences=MAX_LISTED_DIFFERENCES, base=processor_source(cfg)
        )
    except UserError as error:
        return f"export: none, {str(error).rstrip('.')}"
    fields = prompt_differences(cfg, family)
    if not fields:
        return f"export: {family.model_type}"
    return (
        f"export: {family.model_type}, but its processor in transformers does not support "
        f"{' and '.join(fields)}"
    )


def architecture_fields(cfg: Experiment) -> dict[str, object]:
    """Returns the settings that decide the outputs; equal models have equal settings."""
    decoder, fusion = cfg.decoder, cfg.fusion
    decoder = replace(decoder, kv_heads=decoder.num_kv_heads, head_dim=decoder.head_width)
    if decoder.positions != "rope":
        decoder = replace(decoder, rope=type(decoder.rope)())
    fields = _prefixed("decoder", flat(decoder))
    # A copy of a style under another name is the same architecture.
    kind = next(kind for kind, style in FUSION_STYLES.items() if style == fusion.style)
    fields |= {"fusion.kind": kind, "fusion.prefix": fusion.prefix}
    fields["fusion.sublayers"] = fusion.sublayers(decoder.depth)
    if fusion.image_in_memory:
        fields |= {"fusion.has_gates": fusion.has_gates, "fusion.qk_norm": fusion.qk_norm}
        fields["fusion.gate"] = fusion.gate
        fields["fusion.tokens_without_image"] = fusion.tokens_without_image
    if fusion.has_images:
        vision = cfg.vision
        vision = replace(vision, kv_heads=vision.num_kv_heads, head_dim=vision.head_width)
        fields |= _prefixed("vision", flat(vision))
        if vision.is_native:
            # The weights allow any budget, and without learned positions any size.
            fields["vision.max_patches"] = "native"
            if vision.positions != "learned":
                del fields["vision.image_size_px"]
        fields |= _prefixed("projector", _projector_fields(cfg))
    return {
        name: value
        for name, value in fields.items()
        if name.split(".")[1] not in NON_ARCHITECTURE_FIELDS
    }


def _prefixed(section: str, fields: Mapping) -> dict[str, object]:
    return {f"{section}.{name}": value for name, value in fields.items()}


def _projector_fields(cfg: Experiment) -> dict[str, object]:
    """Returns the settings that the projector's kind uses, with the values of those left out."""
    projector = cfg.projector
    if projector.spec.tokens == "queries":
        width = projector.block_width(cfg.vision, cfg.decoder.width)
        projector = replace(
            projector,
            width=width,
            head_dim=projector.head_dim or width // projector.heads,
            block_mlp_width=projector.block_mlp_width or 4 * width,
        )
    fields = {name: getattr(projector, name) for name in projector.spec.fields}
    if fields.get("norm") == "none":
        del fields["norm_eps"]
    if fields.get("projection") in ("linear", "none"):
        del fields["activation"]
    return {"kind": projector.kind} | fields
