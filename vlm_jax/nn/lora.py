"""LoRA (Hu et al. 2021): which kernels have adapters, and the parameters of these.

The adapter of a kernel (inputs, outputs) is a pair of parameters beside it, `lora_a` (inputs, A)
and `lora_b` (A, outputs), and adds scale * x lora_a lora_b to the layer's output. `lora_b` starts
at 0, so that a new adapter changes nothing. Adapters are added to the boxed parameters of any
model, and carry the logical axes of their kernel.

Not qwix 0.1.8: it looks for kernels among the operands of products and adds no adapter to `Dense`,
whose reshaped kernel is behind a custom VJP; nor does it know the axes of `axes.Partitioned`.
"""

import functools
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from vlm_jax import axes
from vlm_jax.config import ConfigError, Lora, Model
from vlm_jax.config.hints import nearest
from vlm_jax.config.model import LoraTarget
from vlm_jax.nn.blocks import BLOCK, LAYERS, SUBLAYERS
from vlm_jax.nn.layers import LORA_A, LORA_B, LORA_DROPOUT
from vlm_jax.nn.parts import Path, find_part
from vlm_jax.nn.quantized import Quantized, is_quantized

# As torch initializes a linear layer, and PEFT lora_A: uniform up to 1 / sqrt(inputs).
INIT_SCALE = 1 / 3


def target_names(path: Path) -> tuple[str, ...]:
    """Returns the targets that a kernel belongs to, the most specific first; (): it has no adapter.

    Kernels of blocks and of the projector can have one.
    """
    part, (*outer, module, _) = find_part(path), path
    names = [f"{part}.{module}", part]
    if len(outer) > 1 and outer[-2].startswith(BLOCK) and outer[-1] in SUBLAYERS:
        is_mlp = SUBLAYERS[outer[-1]].kind == "mlp"
        names.insert(1, f"{part}.{'mlp' if is_mlp else 'attention'}")
    elif part != "projector":
        return ()
    return tuple(names)


def takes_adapter(path: Path, box: axes.Partitioned) -> bool:
    """Returns whether a parameter is a kernel of a block or of the projector."""
    return box.is_kernel and bool(target_names(path))


def find_target(cfg: Lora, path: Path) -> LoraTarget | None:
    """Returns the most specific target that a kernel, or its adapter, matches; None: none."""
    targets = {target.name: target for target in cfg.parsed_targets}
    return next((targets[name] for name in target_names(path) if name in targets), None)


def with_adapters(cfg: Model, params: Mapping, key: jax.Array) -> dict:
    """Adds the adapters of `cfg.lora` to boxed parameters.

    Raises:
      ConfigError: a target matches no kernel.
    """
    boxes = traverse_util.flatten_dict(params)
    kernels = {path: box for path, box in boxes.items() if takes_adapter(path, box)}
    check_targets(cfg.lora, kernels)
    for i, (path, box) in enumerate(sorted(kernels.items())):
        target = find_target(cfg.lora, path)
        if target is not None:
            lora_a, lora_b = _new_adapter(box, target.rank, jax.random.fold_in(key, i))
            boxes |= {(*path[:-1], LORA_A): lora_a, (*path[:-1], LORA_B): lora_b}
    return traverse_util.unflatten_dict(boxes)


def check_targets(cfg: Lora, kernels: Iterable[Path]) -> None:
    """Raises ConfigError if a target matches none of the kernels."""
    names = sorted({name for path in kernels for name in target_names(path)})
    for target in cfg.parsed_targets:
        if target.name not in names:
            raise ConfigError(
                f"lora.targets {target.name} matches no kernel of the model"
                f"{nearest(target.name, names)}: choose {', '.join(names)}."
            )


def check_ranks(cfg: Lora, boxes: Mapping[Path, axes.Partitioned]) -> None:
    """Raises ConfigError if a rank exceeds the inputs or the outputs of a kernel."""
    for path, box in boxes.items():
        target = find_target(cfg, path) if box.is_kernel else None
        if target is None or path[-1] in (LORA_A, LORA_B):
            continue
        width = min(_size(box, box.contracted_axes), _size(box, box.output_axes))
        if target.rank > width:
            raise ConfigError(
                f"lora.rank {target.rank} of lora.targets {target.name} exceeds the smaller "
                f"width, {width}, of {'/'.join(path)}: choose at most {width}."
            )


def _size(box: axes.Partitioned, positions: Iterable[int]) -> int:
    return math.prod(box.value.shape[axis] for axis in positions)


def _new_adapter(box: axes.Partitioned, rank: int, key) -> tuple[axes.Partitioned, ...]:
    """Returns the boxed parameters of a kernel's adapter."""
    letters, shape = box.letters.split(), box.value.shape
    inputs, outputs = box.contracted_axes, box.output_axes
    stacked = range(inputs[0])  # the layers, which are not an axis of the product
    a_axes, b_axes = [*stacked, *inputs], [*outputs]
    a_shape = (*(shape[axis] for axis in a_axes), rank)
    b_shape = (*(shape[axis] for axis in stacked), rank, *(shape[axis] for axis in b_axes))
    init = nn.initializers.variance_scaling(
        INIT_SCALE, "fan_in", "uniform", in_axis=inputs, out_axis=-1, batch_axis=stacked
    )
    a_letters = " ".join([*(letters[axis] for axis in a_axes), "A"])
    b_letters = " ".join([*letters[: inputs[0]], "A", *(letters[axis] for axis in b_axes)])
    return (
        axes.Partitioned(init(key, a_shape), a_letters, contracted=len(inputs)),
        axes.Partitioned(jnp.zeros(b_shape), b_letters, contracted=1),
    )


def as_applied(cfg: Lora, params: Mapping, drops: bool = False) -> dict:
    """Returns parameters by path as `Dense` applies them: with the scale in `lora_b`.

    Args:
      drops: adds the dropout rate beside each adapter; the model then needs the rng "dropout".
    """
    applied = dict(params)
    for path, x in params.items():
        if path[-1] != LORA_B:
            continue
        target = find_target(cfg, path)
        applied[path] = x * cfg.scale(target.rank, target.alpha)
        if drops:
            # One number for each of the stacked layers, over which the blocks are scanned.
            layers = x.shape[: path.count(LAYERS)]
            applied[*path[:-1], LORA_DROPOUT] = jnp.full(layers, cfg.dropout)
    return applied


def merge(cfg: Lora, params: Mapping, dtype=None) -> dict:
    """Returns parameters without adapters, which are added to their kernels in float32.

    Quantized kernels are dequantized.

    Args:
      dtype: of the merged kernels; None: the wider one of kernel and adapter.
    """
    flat = traverse_util.flatten_dict(params)
    merged = {path: x for path, x in flat.items() if path[-1] not in (LORA_A, LORA_B)}
    for path, lora_b in as_applied(cfg, flat).items():
        if path[-1] == LORA_B:
            kernel = (*path[:-1], "kernel")
            arrays = flat[kernel], flat[*path[:-1], LORA_A], lora_b
            merged[kernel] = _add_product(*arrays, is_stacked=LAYERS in path, dtype=dtype)
    for path, x in merged.items():
        if is_quantized(x):
            merged[path] = jax.jit(Quantized.dequantize)(x)
    return traverse_util.unflatten_dict(merged)


@functools.partial(jax.jit, static_argnames=("is_stacked", "dtype"))
def _add_product(kernel, lora_a, lora_b, is_stacked: bool, dtype):
    """Returns kernel + lora_a lora_b; stacked layers one by one, which takes less memory."""

    def add(arrays):
        kernel, lora_a, lora_b = arrays
        if is_quantized(kernel):
            kernel = kernel.dequantize()
        total = kernel + jnp.tensordot(lora_a, lora_b, axes=1, precision="highest")
        return total if dtype is None else total.astype(dtype)

    arrays = kernel, lora_a, lora_b
    return jax.lax.map(add, arrays) if is_stacked else add(arrays)
