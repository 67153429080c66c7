"""The lines that a run prints before its first step: model, data, devices, work folder."""

import math

import jax
import numpy as np

from vlm_jax.config import Experiment
from vlm_jax.data import pipeline, sources
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.hub.export import exportable, is_exportable
from vlm_jax.nn.parts import PARTS, find_part, is_adapter
from vlm_jax.nn.quantized import is_quantized
from vlm_jax.train import optim


def summarize(
    cfg: Experiment, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, params, start: int
) -> str:
    """Returns aligned lines `name  value` about a run.

    Args:
      start: the step that the run continues from; 0 for a new run.
    """
    facts = {
        "model": describe_model(cfg),
        "parameters": describe_parameters(cfg, params),
        "frozen": describe_frozen(cfg, params),
        "devices": describe_devices(mesh),
        "data": describe_data(cfg, tokenizer),
        "steps": describe_steps(cfg, start),
        "begins with": describe_beginning(cfg),
        "export": describe_export(cfg),
        "work folder": cfg.workdir,
        "curves": f"tensorboard --logdir {cfg.workdir}",
    }
    facts = {name: value for name, value in facts.items() if value}
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())


def describe_model(cfg: Experiment) -> str:
    vision, decoder = cfg.vision, cfg.decoder
    stages = [f"decoder {decoder.depth} x {decoder.width}"]
    if cfg.fusion.has_images:
        images = "an image"
        if vision.pictures > 1:
            images = f"each of at most {vision.pictures} views of an image"
        encoder = f"ViT {vision.depth} x {vision.width}" if vision.has_encoder else "no encoder"
        projector = f"{cfg.projector.kind} projector"
        at_most = "at most " if vision.is_native else ""
        tokens = f"{at_most}{cfg.image_tokens} tokens"
        size = "any shape" if vision.is_native else f"{vision.image_size_px} px"
        stages = [f"{images} ({size})", encoder, projector, tokens, *stages]
    return f"{cfg.fusion.kind}: {' -> '.join(stages)} (blocks x width)"


def describe_parameters(cfg: Experiment, params) -> str:
    trained, frozen = optim.split(params, cfg.optim)
    trained_size = sum(x.size for x in trained.values())
    total = trained_size + sum(x.size for x in frozen.values())
    if not frozen:
        return f"{total:,}, all trained"
    frozen_parts = {find_part(path) for path in frozen}
    adapted_parts = {find_part(path) for path in trained if is_adapter(path)}
    names = []
    for part in PARTS:
        if part in frozen_parts:
            names.append(f"{part} (with LoRA)" if part in adapted_parts else part)
    return f"{total:,}, {trained_size / total:.1%} trained; frozen: {', '.join(names)}"


def describe_frozen(cfg: Experiment, params) -> str:
    """Returns the size of the frozen parameters of each part, and the error of quantized ones."""
    _, frozen = optim.split(params, cfg.optim)
    arrays_of_part: dict[str, list] = {}
    for path, x in frozen.items():
        arrays_of_part.setdefault(find_part(path), []).append(x)
    texts = []
    for part in PARTS:
        if part in arrays_of_part:
            texts.append(f"{part} {_describe_storage(cfg, arrays_of_part[part])}")
    return "; ".join(texts)


def _describe_storage(cfg: Experiment, arrays: list) -> str:
    num_stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    quantized = [x for x in arrays if is_quantized(x)]
    if not quantized:
        return f"{_mib(num_stored)} in {cfg.train.frozen_float_dtype}"
    num_bfloat16 = sum(2 * x.size for x in arrays)
    # The errors of each layer are relative to its own kernel.
    weights = [x.size for x in quantized]
    squares = [np.mean(np.square(jax.device_get(x.error))) for x in quantized]
    error = math.sqrt(np.average(squares, weights=weights))
    return (
        f"{_mib(num_stored)} in {cfg.train.frozen_dtype} instead of {_mib(num_bfloat16)} in "
        f"bfloat16, with an RMS error of {error:.2%} in its kernels"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def describe_devices(mesh: jax.sharding.Mesh) -> str:
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {kind}{processes}, mesh {sizes}"


def describe_data(cfg: Experiment, tokenizer: Tokenizer) -> str:
    if cfg.data.mixture:
        return describe_mixture(cfg, tokenizer)
    name = f"{cfg.data.source} {cfg.data.train_split}"
    if cfg.data.is_conversations:
        source = pipeline.conversation_source(cfg.data, cfg.data.train_split)
        return (
            f"{name}: {len(source):,} conversations, packed into rows of {cfg.row_length:,} tokens"
        )
    images = len(sources.load(cfg.data, cfg.data.train_split))
    steps = images / cfg.train.batch_size
    return (
        f"{name}: {images:,} images, one a row of {cfg.row_length:,} tokens; an epoch is "
        f"{steps:,.1f} steps"
    )


def describe_mixture(cfg: Experiment, tokenizer: Tokenizer) -> str:
    examples = "conversations" if cfg.data.is_conversations else "images"
    sources = []
    for name, (count, share) in pipeline.mixture_counts(cfg, tokenizer).items():
        facts = f"{count:,} {examples}"
        if not cfg.data.is_conversations:
            steps = count / share / cfg.train.batch_size
            facts += f", an epoch is {steps:,.1f} steps"
        sources.append(f"{name} {share:.1%} ({facts})")
    return f"{', '.join(sources)}; rows of {cfg.row_length:,} tokens"


def describe_steps(cfg: Experiment, start: int) -> str:
    text = f"{cfg.train.steps:,} of {cfg.train.batch_size:,} rows"
    warmup, asked = optim.warmup_steps(cfg.optim, cfg.train.steps), cfg.optim.warmup_steps
    if warmup < asked:
        text += f", warm-up of {warmup:,} instead of optim.warmup_steps {asked:,}"
    return f"{text}, continuing after step {start:,}" if start else text


def describe_beginning(cfg: Experiment) -> str:
    """Names the checkpoint folder of each pretrained part; "" for a model from scratch."""
    folders: dict[str, list[str]] = {}
    for part in cfg.pretrained_parts:
        folders.setdefault(getattr(cfg, part).checkpoint, []).append(part)
    beginnings = [f"{folder} ({', '.join(parts)})" for folder, parts in folders.items()]
    if cfg.adapter:
        beginnings.append(f"{cfg.adapter} (adapter)")
    return "; ".join(beginnings)


def describe_export(cfg: Experiment) -> str:
    """Names the family of an export, or why a model from a checkpoint has none any more.

    It is "" for a model from scratch that no family describes.
    """
    if not cfg.begins_with_any and not is_exportable(cfg):
        return ""
    return exportable(cfg).removeprefix("export: ")
