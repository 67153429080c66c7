"""Shardings of every parameter of two published models, as committed tables that show changes.

`python -m tests.test_shardings` writes them anew, on purpose.
"""

import math
from pathlib import Path

import jax
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh

from tests.nn.programs import equations
from vlm_jax import axes
from vlm_jax.config import Mesh, files
from vlm_jax.nn.models import abstract_params
from vlm_jax.nn.parts import PARTS, find_part
from vlm_jax.nn.vlm import VLM
from vlm_jax.testing import (
    KINDS,
    random_batch,
    random_params,
    tiny,
)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
MODELS = ("llava_1_5_7b", "llama_3_2_11b_vision")
MESHES = ((1, 8, 2), (1, 64, 1))  # data x fsdp x tensor
FLOAT32_BYTES = 4
COLUMNS = ("parameter", "letters", "shape", "split over", "bytes a device")
every_table = pytest.mark.parametrize("sizes", MESHES, ids=str)
every_model = pytest.mark.parametrize("name", MODELS)


def rows(name, sizes):
    """(path, letters, shape, spec, float32 bytes on one device) of every parameter, by path."""
    mesh = AbstractMesh(sizes, axes.MESH_AXES)
    cfg = files.load(str(ROOT / "configs" / "published" / f"{name}.py"))
    boxes = traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    for path, box in sorted(boxes.items()):
        shape, spec = box.value.shape, axes.parameter_spec(box.letters, box.value.shape, mesh)
        parts = math.prod(mesh.shape[axis] for axis in spec if axis)
        yield path, box.letters, shape, spec, FLOAT32_BYTES * math.prod(shape) // parts


def table(name, sizes):
    lines = [COLUMNS]
    for path, letters, shape, spec, size in rows(name, sizes):
        lines.append(
            (
                path,
                letters,
                " ".join(map(str, shape)),
                " ".join(axis or "-" for axis in spec),
                f"{size:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() + "\n"
        for line in lines
    )


def file(name, sizes):
    data, fsdp, tensor = sizes
    return GOLDEN / f"{name}_data{data}_fsdp{fsdp}_tensor{tensor}.txt"


@every_model
@every_table
def test_every_parameter_lies_where_the_committed_table_says(name, sizes):
    assert table(name, sizes) == file(name, sizes).read_text()


@every_model
@every_table
def test_nearly_all_bytes_are_divided_by_all_devices(name, sizes):
    whole = {path: FLOAT32_BYTES * math.prod(shape) for path, _, shape, _, _ in rows(name, sizes)}
    divided = sum(
        whole[path]
        for path, _, _, _, size in rows(name, sizes)
        if size * math.prod(sizes) == whole[path]
    )
    assert divided > 0.99 * sum(whole.values())


@every_model
@every_table
def test_every_part_is_divided_by_fsdp_at_least(name, sizes):
    """Biases and gates, which are not, are a few percent of a part."""
    held = {}
    for path, _, shape, _, size in rows(name, sizes):
        whole, on_one = held.get(find_part(tuple(path.split("/"))), (0, 0))
        held[find_part(tuple(path.split("/")))] = (
            whole + FLOAT32_BYTES * math.prod(shape),
            on_one + size,
        )
    assert held.keys() == {*PARTS[:3], *(PARTS[3:] if name == "llama_3_2_11b_vision" else ())}
    for part, (whole, on_one) in held.items():
        assert on_one < 1.05 * whole / sizes[1], part


def pinned(cfg) -> set[tuple[str, str, str]]:
    """(part, module, place on the mesh) of all activations that are pinned there."""
    with jax.set_mesh(axes.make_mesh(Mesh(2, 2, 2))):
        program = jax.make_jaxpr(VLM(cfg.model).apply)(
            {"params": random_params(cfg)}, random_batch(cfg, rows=8)
        )
    found = set()
    for path, equation in equations(program.jaxpr):
        if equation.primitive.name == "sharding_constraint":
            names = path.split("/")
            part = next((part for part in ("vision", "decoder") if part in names), "")
            found.add((part, names[-1], " ".join(map(str, equation.params["sharding"].spec))))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_every_part_are_pinned_to_the_mesh(kind):
    """The compiler carries placements on from the parameters, but need not choose these."""
    cfg = tiny(kind)
    rows = "('data', 'fsdp') None"
    whole, wide, heads = f"{rows} None", f"{rows} tensor", f"{rows} tensor None"
    of_block = {("self", heads), ("mlp", wide), ("block_0", whole)}
    of_cross = (
        {("cross", heads), ("cross_mlp", wide)}
        if cfg.fusion.has_cross_blocks
        else {("cross", heads)}
    )
    expected = {
        ("decoder", *pin) for pin in of_block | (of_cross if cfg.fusion.image_in_memory else set())
    }
    expected |= {("", "VLM", wide)}  # the logits
    if cfg.fusion.has_images:
        expected |= {("vision", *pin) for pin in of_block | {("vision.encode", whole)}}
        expected |= {("", "VLM.image_tokens", whole)}  # what the projector gives
    assert pinned(cfg) == expected


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for model in MODELS:
        for mesh_sizes in MESHES:
            file(model, mesh_sizes).write_text(table(model, mesh_sizes))
