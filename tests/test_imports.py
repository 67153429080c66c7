"""Imports point only backwards along the way that data flows, and walls between rooms hold."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vlm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own line and the lines above; the first prefix that fits says where it stands.
FLOW = [
    ["model_config", "start"],
    ["config"],
    ["axes", "structs", "limits", "combinations", "chips", "lfs", "hints"],
    ["validate"],
    ["config_file"],
    ["workdir", "distributed"],
    ["data"],
    ["nn"],
    ["hub", "testing"],
    ["train", "flops"],
    ["plan"],
    ["report"],
    ["infer"],
    ["cli_hub"],
    ["cli"],
    ["__main__"],
    ["study"],
]
FORBIDDEN = {  # room: top-level packages or rooms of ours that it must not know
    "": {"torch", "transformers", "tensorflow"},
    "nn": {"optax", "orbax", "grain", "tokenizers", "tensorflow_datasets", "vlm_jax.data", "vlm_jax.train"},
    "data": {"jax", "flax", "optax", "vlm_jax.nn", "vlm_jax.train"},
    "config": {"jax", "flax", "numpy", "tyro"},
    "model_config": {"jax", "flax", "numpy", "tyro"},
    "hub": {"vlm_jax.train"},
}
by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def module(path: Path) -> str:
    """'nn.vlm' for vlm_jax/nn/vlm.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def place(name: str) -> int:
    found = [i for i, line in enumerate(FLOW) if any(is_under(name, prefix) for prefix in line)]
    assert len(found) == 1, f"vlm_jax.{name} has no place in FLOW"
    return found[0]


def test_there_are_files_to_look_at():
    assert {"nn.vlm", "data.text", "cli", "train.loop"} <= {module(path) for path in FILES}


@by_name
def test_imports_point_only_backwards(path):
    if not module(path):
        return
    ours = {name.removeprefix("vlm_jax.") for name in imported(path) if is_under(name, "vlm_jax")}
    forward = {name for name in ours if place(name) > place(module(path))}
    assert not forward


@by_name
def test_a_room_does_not_know_what_it_must_not(path):
    for room, forbidden in FORBIDDEN.items():
        if not room or is_under(module(path), room):
            assert not {name for name in imported(path) for prefix in forbidden if is_under(name, prefix)}


@by_name
def test_only_axes_says_partition_spec(path):
    assert ("PartitionSpec" in path.read_text()) == (module(path) == "axes")


@by_name
def test_a_mask_is_made_in_fusion_alone(path):
    """Nowhere else does the model read what says who sees whom."""
    if is_under(module(path), "nn") and module(path) not in ("nn.fusion", "nn.vlm"):
        read = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not read & {"segment_ids", "branch_ids", "image_slots", "image_mask"}
