"""FLOPs and HBM traffic of one HLO instruction on one chip."""

import math
import re

from vlm_jax.plan.hlo_text import Computation, Instruction

# Attention kernels (nn/kernels.py) -> matmuls of queries and keys in each.
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
# Instructions that move no bytes themselves.
FREE = {
    "after-all",
    "all-gather-done",
    "all-reduce-done",
    "async-done",
    "bitcast",
    "call",
    "collective-permute-done",
    "conditional",
    "constant",
    "copy-done",
    "get-tuple-element",
    "iota",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "tuple",
    "while",
}
CONTRACTED = re.compile(r"lhs_contracting_dims=\{(?P<axes>[\d,]*)\}")
DIM_LABELS = re.compile(r"dim_labels=(?P<input>\w+)_(?P<kernel>\w+)->(?P<output>\w+)")
WINDOW = re.compile(r"window=\{(?P<settings>[^}]*)\}")
WINDOW_SETTING = re.compile(r"(?P<name>\w+)=(?P<values>[\dx_-]+)")
BATCH_GROUPS = re.compile(r"batch_group_count=(?P<count>\d+)")


def flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of matmuls, convolutions and attention kernels; 0 for everything else."""
    if instruction.opcode == "custom-call":
        return _kernel_flops(instruction, computation)
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left = computation[instruction.operands[0]].shapes[0].sizes
    right = computation[instruction.operands[1]].shapes[0].sizes
    out = instruction.shapes[0].sizes
    if instruction.opcode == "convolution":
        return _convolution_flops(left, right, out, instruction.attributes)
    axes = CONTRACTED.search(instruction.attributes)["axes"]
    contracted = [left[int(axis)] for axis in axes.split(",") if axis]
    return 2.0 * math.prod(out) * math.prod(contracted)


def _kernel_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of an attention kernel, whose matmuls the compiler does not see.

    Queries and keys are (heads, length, head dim), with the rows in front where all rows of a batch
    are in one call. Blocks that the kernel skips are counted as well.
    """
    counts = [count for name, count in KERNELS.items() if instruction.name.startswith(name)]
    if not counts:
        return 0.0
    inputs = [computation[name].shapes[0] for name in instruction.operands]
    floats = [x.sizes for x in inputs if len(x.sizes) in (3, 4) and x.dtype in ("bf16", "f32")]
    queries, keys = floats[:2]
    return 2.0 * counts[0] * math.prod(queries) * keys[-2]


def _convolution_flops(left, right, out, attributes: str) -> float:
    """FLOPs of a convolution, without products with padding.

    The TPU compiler writes batched matmuls as convolutions with a lot of padding.
    """
    labels = DIM_LABELS.search(attributes)
    window = WINDOW.search(attributes)
    settings = dict(WINDOW_SETTING.findall(window["settings"])) if window else {}
    in_channels = right[labels["kernel"].index("i")]
    batch, out_channels = out[labels["output"].index("b")], out[labels["output"].index("f")]
    count = 2.0 * in_channels * batch * out_channels
    # Spatial dimensions are digits; every setting has one value for each, such as "3x3".
    spatial = sorted(letter for letter in labels["output"] if letter.isdigit())
    for i, letter in enumerate(spatial):
        count *= _valid_positions(
            left[labels["input"].index(letter)],
            right[labels["kernel"].index(letter)],
            out[labels["output"].index(letter)],
            {name: values.split("x")[i] for name, values in settings.items()},
        )
    groups = BATCH_GROUPS.search(attributes)
    return count / (int(groups["count"]) if groups else 1)


def _valid_positions(size: int, kernel: int, out: int, setting: dict[str, str]) -> int:
    """Number of (output, kernel) positions of one dimension that read an input, not padding."""
    stride = int(setting.get("stride", 1))
    input_dilation = int(setting.get("lhs_dilate", 1))
    kernel_dilation = int(setting.get("rhs_dilate", 1))
    padding = int(setting.get("pad", "0_0").split("_")[0])
    last = (size - 1) * input_dilation
    positions = (
        o * stride + k * kernel_dilation - padding for o in range(out) for k in range(kernel)
    )
    return sum(0 <= x <= last and x % input_dilation == 0 for x in positions)


def hbm_bytes(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> float:
    """Bytes that an instruction reads and writes; only the slice of an operand that is sliced."""
    if instruction.opcode in FREE:
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode == "fusion":
        return _fusion_bytes(operands, computations[instruction.called[0]])
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * instruction.hbm_bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].hbm_bytes
    return instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands)


def _fusion_bytes(operands: list[Instruction], body: Computation) -> float:
    """Bytes that a fusion reads from its operands and writes for its results."""
    total = 0
    for inner in body.values():
        if inner.opcode == "parameter" and operands[int(inner.operands[0])].hbm_bytes:
            users = [user for user in body.values() if inner.name in user.operands]
            # Several users read the operand once.
            total += min(inner.hbm_bytes, sum(_bytes_read(user, inner) for user in users))
    root = next(inner for inner in body.values() if inner.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return total + sum(_bytes_written(result, body) for result in results)


def _bytes_read(user: Instruction, operand: Instruction) -> int:
    """Bytes of an operand that one of its users reads."""
    if user.operands[0] == operand.name and user.opcode in ("dynamic-slice", "slice", "gather"):
        return user.hbm_bytes
    if user.operands[0] == operand.name and user.opcode == "dynamic-update-slice":
        return 0
    return operand.hbm_bytes


def _bytes_written(result: Instruction, body: Computation) -> int:
    """Bytes of a fusion's result; an in-place update writes only its slice."""
    while result.opcode == "bitcast" and result.operands[0] in body:
        result = body[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return body[result.operands[1]].hbm_bytes
    return result.hbm_bytes
