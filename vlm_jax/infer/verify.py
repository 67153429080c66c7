"""Compares the outputs of a public checkpoint with a reference implementation's.

The reference is an .npz file with the arrays of one or more cases:

    <case>/in/<argument>    <case>/out/<output>    <case>/valid (optional, bool: compare only there)

Arguments and outputs have the names of transformers.
"""

import functools
import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from vlm_jax.config import ConfigError, Contrastive, Experiment, UserError, Vision
from vlm_jax.hub.families.registry import possible_intermediate_layers
from vlm_jax.hub.image_inputs import encoder_inputs, image_batch
from vlm_jax.hub.inputs import argument_names, to_batch
from vlm_jax.hub.load import Checkpoint, load_checkpoint
from vlm_jax.infer.generate import NonFiniteLogits, SamplingParams, generate
from vlm_jax.nn.models import build_model
from vlm_jax.nn.vlm import VLM


class Comparison(NamedTuple):
    """One output of one case; `reason` tells why it was not compared."""

    case: str
    output: str
    shape: tuple[int, ...]
    difference: float | None = None  # largest absolute one; for new_ids the count of other tokens
    tolerance: float | None = None
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return self.difference is not None and self.difference <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """Comparison of a checkpoint with a reference."""

    comparisons: list[Comparison]
    intermediate_layers: str | None  # convention that was tried; None: the checkpoint's own

    @property
    def compared(self) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if not comparison.reason]

    @property
    def agreeing(self) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if comparison.agrees]

    @property
    def agrees(self) -> bool:
        """True if at least one output was compared and all that were compared agree."""
        return bool(self.compared) and len(self.agreeing) == len(self.compared)


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
        return _apply(self.params, inputs, self.checkpoint.cfg, method)


# Jitted once for all outputs and cases: equal shapes compile once.
@functools.partial(jax.jit, static_argnames=("cfg", "method"))
def _apply(params, inputs: tuple, cfg, method):
    return build_model(cfg).apply({"params": params}, *inputs, method=method)


def verify(
    folder: str | os.PathLike,
    reference: str | os.PathLike,
    outputs: Collection[str] = (),
    atol: float | None = None,
    intermediate_layers: str | None = None,
    adapter: str | os.PathLike | None = None,
) -> Verification:
    """Runs every case of the reference and compares the outputs.

    Where neither `intermediate_layers` nor config.json names the convention of a Llama 3.2 Vision,
    only the reference can tell: both are tried, and the one that agrees is returned, else the last.

    Args:
      folder: of a public checkpoint.
      reference: .npz file, as described at the top of this module.
      outputs: names of the outputs to compare; empty: all.
      atol: largest absolute difference; None: the tolerance of the family.
      intermediate_layers, adapter: as in `load_checkpoint`.

    Raises:
      UserError: the folder cannot be loaded, or the reference is not such a file.
    """
    cases = read_cases(reference)
    conventions = possible_intermediate_layers(folder, intermediate_layers)
    for convention in conventions:
        model = Model(
            *load_checkpoint(folder, np.float32, intermediate_layers=convention, adapter=adapter)
        )
        tolerance = model.checkpoint.family.tolerance if atol is None else atol
        comparisons = []
        with jax.default_matmul_precision("highest"):
            for case in cases:
                comparisons += compare(model, case, outputs, tolerance)
        tried = convention if len(conventions) > 1 else None
        verification = Verification(comparisons, tried)
        if verification.agrees:
            break
    return verification


def read_cases(path: str | os.PathLike) -> list[Case]:
    """Reads a reference. Raises ConfigError if it is not an .npz file of such arrays."""
    try:
        with np.load(Path(os.path.expanduser(path))) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise ConfigError(
            f"--reference {path} cannot be read: {error.strerror or error}."
        ) from None
    except (ValueError, zipfile.BadZipFile, zlib.error, TypeError, AttributeError, EOFError):
        raise ConfigError(f"--reference {path} is not an .npz file of arrays.") from None
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


def compare(
    model: Model, case: Case, selected: Collection[str], tolerance: float
) -> list[Comparison]:
    """Compares the selected outputs of a case (none selected: all)."""
    known = supported_arguments(model.checkpoint.cfg)
    comparisons = [
        Comparison(
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
        if selected and name not in selected:
            continue
        if name not in computed:
            reason = f"output not supported: the model has {', '.join(computed)}"
            comparisons.append(Comparison(case.name, name, expected.shape, reason=reason))
            continue
        comparisons.append(compare_output(model, case, name, tolerance))
    return comparisons


def compare_output(model: Model, case: Case, name: str, tolerance: float) -> Comparison:
    shape = case.outputs[name].shape
    try:
        actual = OUTPUTS[type(model.checkpoint.cfg)][name](model, case)
    except KeyError as missing:
        return Comparison(case.name, name, shape, reason=f"the case lacks the argument {missing}")
    except UserError as error:
        raise ConfigError(f"case {case.name}: {error}") from None
    except NonFiniteLogits:
        return Comparison(case.name, name, shape, np.inf, 0)
    if actual is None:
        return Comparison(case.name, name, shape, reason="the checkpoint has no tensors for it")
    limit = 0 if name == "new_ids" else tolerance
    largest = measure_difference(model, case, name, np.asarray(actual))
    return Comparison(case.name, name, shape, largest, limit)


def supported_arguments(cfg) -> tuple[str, ...]:
    """Names of the arguments that a model takes."""
    if isinstance(cfg, Experiment):
        return argument_names(cfg)
    images = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    return images if isinstance(cfg, Vision) else ("input_ids", "attention_mask", *images)


def measure_difference(model: Model, case: Case, name: str, actual: np.ndarray) -> float:
    """Returns the largest absolute difference of an output, or for new_ids the count of other
    tokens.

    It is infinite if shapes differ or a number is NaN.
    """
    expected = case.outputs[name]
    if actual.size == expected.size and name == "image_features":
        actual = actual.reshape(expected.shape)
    if actual.shape != expected.shape:
        return np.inf
    if name == "new_ids":
        differs = (actual != expected) & ~find_padding(expected, model.checkpoint.eos_ids)
        return float(np.sum(differs))
    differences = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    valid = find_valid(case, name, expected)
    if valid is not None:
        differences = differences[valid]
    return float(np.nan_to_num(differences, nan=np.inf).max(initial=0.0))


def find_valid(case: Case, name: str, expected: np.ndarray) -> np.ndarray | None:
    """Mask of the positions to compare: `valid` of the case, or the mask of tokens or patches."""
    masks = [case.valid]
    if name == "last_hidden_state":
        masks.append(case.inputs.get("pixel_attention_mask"))
    if name == "logits":
        masks += [case.inputs.get(key) for key in ("decoder_attention_mask", "attention_mask")]
    for mask in masks:
        if mask is not None and mask.shape == expected.shape[: mask.ndim]:
            return mask.astype(bool)
    return None


def find_padding(ids: np.ndarray, eos_ids: Collection[int]) -> np.ndarray:
    """Mask (B, n) of the tokens after the first end of text, if they are all the same token."""
    ended = np.cumsum(np.isin(ids, list(eos_ids)), axis=1)
    follows = np.pad(ended[:, :-1], ((0, 0), (1, 0))) > 0
    return follows & np.all(~follows | (ids == ids[:, -1:]), axis=1, keepdims=True)


def _logits(model: Model, case: Case) -> np.ndarray:
    checkpoint = model.checkpoint
    counts = checkpoint.family.counts_positions
    return model.apply(
        to_batch(checkpoint.cfg, case.inputs, checkpoint.image_token, generating=counts)
    ).logits


def _image_features(model: Model, case: Case) -> np.ndarray:
    cfg = model.checkpoint.cfg
    batch = image_batch(cfg, case.inputs)
    if cfg.vision.tile_grids:
        return model.apply(batch, method=VLM.decoder_inputs).x
    tokens = model.apply(batch, method=VLM.image_tokens)
    # The reference's features are without the hidden states of DeepStack, which follow.
    return tokens[..., : cfg.decoder.width] if cfg.vision.deepstack_layers else tokens


def _new_ids(model: Model, case: Case) -> np.ndarray:
    checkpoint = model.checkpoint
    inputs = case.inputs
    needs_start = checkpoint.cfg.fusion.is_encoder_decoder
    if needs_start and "decoder_input_ids" not in inputs and checkpoint.start_id is not None:
        start = np.full((len(inputs["pixel_values"]), 1), checkpoint.start_id)
        inputs = inputs | {"decoder_input_ids": start}
    prompt = to_batch(checkpoint.cfg, inputs, checkpoint.image_token, generating=True)
    new_tokens = case.outputs["new_ids"].shape[1]
    return generate(checkpoint.cfg.model, model.params, prompt, new_tokens, SamplingParams())


def _encoder_output(field: str) -> Callable:
    def output(model: Model, case: Case):
        images, *packed = _images(case)
        tiles = None, None  # layouts and mask of tiles
        return getattr(model.apply(images, *tiles, *packed, method="encode"), field)

    return output


def _images(case: Case) -> tuple:
    return encoder_inputs(case.inputs)


def _texts(case: Case) -> tuple:
    mask = case.inputs.get("attention_mask")
    return case.inputs["input_ids"], None if mask is None else mask.astype(bool)


def _embedding(inputs: Callable, method: str) -> Callable:
    return lambda model, case: model.apply(*inputs(case), method=method)


def _logits_per_image(model: Model, case: Case):
    images, *packed = _images(case)
    return model.apply(images, *_texts(case), *packed).logits_per_image


OUTPUTS = {
    Experiment: {"logits": _logits, "image_features": _image_features, "new_ids": _new_ids},
    Vision: {
        "last_hidden_state": _encoder_output("tokens"),
        "pooler_output": _encoder_output("pooled"),
        "logits": _encoder_output("logits"),
    },
    Contrastive: {
        "image_embeds": _embedding(_images, "image_embeds"),
        "text_embeds": _embedding(_texts, "text_embeds"),
        "image_features": _embedding(_images, "image_features"),
        "text_features": _embedding(_texts, "text_features"),
        "logits_per_image": _logits_per_image,
        "logits_per_text": lambda model, case: _logits_per_image(model, case).T,
    },
}


def table(comparisons: list[Comparison]) -> str:
    """Formats comparisons as lines of text."""
    rows = [("case", "output", "shape", "largest difference", "tolerance", "ok")]
    for comparison in comparisons:
        shape = "x".join(map(str, comparison.shape))
        if comparison.reason:
            numbers = ("not compared", "", comparison.reason)
        else:
            numbers = (
                f"{comparison.difference:.2e}",
                f"{comparison.tolerance:.0e}",
                "yes" if comparison.agrees else "NO",
            )
        rows.append((comparison.case, comparison.output, shape, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
