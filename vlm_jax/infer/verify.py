"""Our outputs against those of a reference: the arrays of an .npz file, case by case.

    <case>/in/<argument>    <case>/out/<output>    <case>/valid (optional, bool: compare only there)

Arguments and outputs have the names of transformers.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from vlm_jax.config import (
    ConfigError,
    Contrastive,
    Experiment,
    UserError,
    Vision,
)
from vlm_jax.hub.inputs import (
    argument_names,
    channels_last,
    image_batch,
    to_batch,
)
from vlm_jax.hub.load import Checkpoint, load_checkpoint
from vlm_jax.infer.generate import NonFiniteLogits, SamplingParams, generate
from vlm_jax.nn.models import build_model
from vlm_jax.nn.vlm import VLM


class Result(NamedTuple):
    """One output of one case; `reason` says why it was not compared."""

    case: str
    output: str
    shape: tuple[int, ...]
    difference: float | None = None  # the largest, absolute; tokens that differ for new_ids
    tolerance: float | None = None
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.difference is not None and self.difference <= self.tolerance


class Case(NamedTuple):
    name: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    valid: np.ndarray | None


class Model(NamedTuple):
    """A checkpoint and its parameters in float32."""

    checkpoint: Checkpoint
    params: dict

    def apply(self, *inputs, method=None):
        module = build_model(self.checkpoint.cfg)
        return jax.jit(
            lambda params, *given: module.apply({"params": params}, *given, method=method)
        )(self.params, *inputs)


def verify(
    folder: str | os.PathLike,
    reference: str | os.PathLike,
    outputs: Collection[str] = (),
    atol: float | None = None,
    taps: str | None = None,
) -> list[Result]:
    """Runs every case of the reference; `outputs` restricts what is compared (empty: all).

    `atol` None is the family's tolerance; `taps` is of `load_checkpoint`.

    Raises:
      ConfigError: the folder cannot be loaded, or the reference is no .npz file of such arrays.
    """
    cases = read_cases(reference)
    model = Model(*load_checkpoint(folder, np.float32, taps=taps))
    tolerance = model.checkpoint.family.tolerance if atol is None else atol
    with jax.default_matmul_precision("highest"):
        return [result for case in cases for result in compare(model, case, outputs, tolerance)]


def read_cases(path: str | os.PathLike) -> list[Case]:
    try:
        with np.load(Path(path).expanduser()) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise ConfigError(
            f"--reference {path} cannot be read: {error.strerror or error}."
        ) from None
    except (ValueError, zipfile.BadZipFile, zlib.error, TypeError, AttributeError, EOFError):
        raise ConfigError(f"--reference {path} is no .npz file of arrays.") from None
    names = sorted({name.split("/in/")[0] for name in stored if "/in/" in name})
    if not names:
        raise ConfigError(
            f"--reference {path} holds no array <case>/in/<argument>, such as a/in/input_ids."
        )
    return [
        Case(
            name,
            _under(stored, f"{name}/in/"),
            _under(stored, f"{name}/out/"),
            stored.get(f"{name}/valid"),
        )
        for name in names
    ]


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def compare(model: Model, case: Case, wanted: Collection[str], tolerance: float) -> list[Result]:
    known = arguments_of(model.checkpoint.cfg)
    results = [
        Result(
            case.name,
            name,
            array.shape,
            reason=f"argument not supported: the model takes {', '.join(known)}",
        )
        for name, array in case.inputs.items()
        if name not in known
    ]
    computed = OUTPUTS[type(model.checkpoint.cfg)]
    for name, expected in case.outputs.items():
        if wanted and name not in wanted:
            continue
        if name not in computed:
            reason = f"output not supported: the model has {', '.join(computed)}"
            results.append(Result(case.name, name, expected.shape, reason=reason))
            continue
        results.append(one_output(model, case, name, tolerance))
    return results


def one_output(model: Model, case: Case, name: str, tolerance: float) -> Result:
    shape = case.outputs[name].shape
    try:
        found = OUTPUTS[type(model.checkpoint.cfg)][name](model, case)
    except KeyError as missing:
        return Result(case.name, name, shape, reason=f"the case lacks the argument {missing}")
    except UserError as error:
        raise ConfigError(f"case {case.name}: {error}") from None
    except NonFiniteLogits:
        return Result(case.name, name, shape, np.inf, 0)
    if found is None:
        return Result(case.name, name, shape, reason="the checkpoint has no tensors for it")
    limit = 0 if name == "new_ids" else tolerance
    return Result(case.name, name, shape, difference(model, case, name, np.asarray(found)), limit)


def arguments_of(cfg) -> tuple[str, ...]:
    if isinstance(cfg, Experiment):
        return argument_names(cfg.fusion)
    return (
        ("pixel_values",)
        if isinstance(cfg, Vision)
        else ("input_ids", "attention_mask", "pixel_values")
    )


def difference(model: Model, case: Case, name: str, found: np.ndarray) -> float:
    """The largest absolute difference where the case is valid; infinite where shapes differ or a number is NaN."""
    expected = case.outputs[name]
    if found.size == expected.size and name == "image_features":
        found = found.reshape(expected.shape)
    if found.shape != expected.shape:
        return np.inf
    if name == "new_ids":
        return float(np.sum((found != expected) & ~filling(expected, model.checkpoint.eos_ids)))
    apart = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    valid = valid_of(case, name, expected)
    apart = apart if valid is None else apart[valid]
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0))


def valid_of(case: Case, name: str, expected: np.ndarray) -> np.ndarray | None:
    """Where to compare: the case's `valid`, or of logits those of tokens that the attention mask says are there."""
    masks = [case.inputs.get(name) for name in ("decoder_attention_mask", "attention_mask")]
    for mask in (case.valid, *(masks if name == "logits" else ())):
        if mask is not None and mask.shape == expected.shape[: mask.ndim]:
            return mask.astype(bool)
    return None


def filling(ids: np.ndarray, eos_ids: Collection[int]) -> np.ndarray:
    """(B, n) bool: what follows the first end of text, if it is one token over and over."""
    ended = np.cumsum(np.isin(ids, list(eos_ids)), axis=1)
    follows = np.pad(ended[:, :-1], ((0, 0), (1, 0))) > 0
    return follows & np.all(~follows | (ids == ids[:, -1:]), axis=1, keepdims=True)


def _logits(model: Model, case: Case) -> np.ndarray:
    checkpoint = model.checkpoint
    return model.apply(to_batch(checkpoint.cfg, case.inputs, checkpoint.image_token)).logits


def _image_features(model: Model, case: Case) -> np.ndarray:
    checkpoint = model.checkpoint
    return model.apply(image_batch(checkpoint.cfg, case.inputs), method=VLM.image_tokens)


def _new_ids(model: Model, case: Case) -> np.ndarray:
    checkpoint = model.checkpoint
    inputs, starts = case.inputs, checkpoint.cfg.fusion.is_encoder_decoder
    if starts and "decoder_input_ids" not in inputs and checkpoint.start_id is not None:
        inputs = inputs | {
            "decoder_input_ids": np.full((len(inputs["pixel_values"]), 1), checkpoint.start_id)
        }
    prompt = to_batch(checkpoint.cfg, inputs, checkpoint.image_token, generating=True)
    return generate(
        checkpoint.cfg.model,
        model.params,
        prompt,
        case.outputs["new_ids"].shape[1],
        SamplingParams(),
    )


def _encoded(field: str) -> Callable:
    def output(model: Model, case: Case):
        return getattr(model.apply(*_images(case), method="encode"), field)

    return output


def _images(case: Case) -> tuple:
    return (channels_last(case.inputs["pixel_values"]),)


def _texts(case: Case) -> tuple:
    mask = case.inputs.get("attention_mask")
    return case.inputs["input_ids"], None if mask is None else mask.astype(bool)


def _embedded(inputs: Callable, method: str) -> Callable:
    return lambda model, case: model.apply(*inputs(case), method=method)


def _logits_per_image(model: Model, case: Case):
    return model.apply(*_images(case), *_texts(case)).logits_per_image


OUTPUTS = {
    Experiment: {"logits": _logits, "image_features": _image_features, "new_ids": _new_ids},
    Vision: {
        "last_hidden_state": _encoded("tokens"),
        "pooler_output": _encoded("pooled"),
        "logits": _encoded("logits"),
    },
    Contrastive: {
        "image_embeds": _embedded(_images, "image_embeds"),
        "text_embeds": _embedded(_texts, "text_embeds"),
        "image_features": _embedded(_images, "image_features"),
        "text_features": _embedded(_texts, "text_features"),
        "logits_per_image": _logits_per_image,
        "logits_per_text": lambda model, case: _logits_per_image(model, case).T,
    },
}


def table(results: list[Result]) -> str:
    """The results as lines of text."""
    rows = [("case", "output", "shape", "largest difference", "tolerance", "ok")]
    for result in results:
        shape = "x".join(map(str, result.shape))
        if result.reason:
            rows.append((result.case, result.output, shape, "not compared", "", result.reason))
        else:
            numbers = (
                f"{result.difference:.2e}",
                f"{result.tolerance:.0e}",
                "yes" if result.ok else "NO",
            )
            rows.append((result.case, result.output, shape, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
