"""Imports point only backwards along the data flow, and packages keep their boundaries."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vlm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own line and the lines above. The longest prefix of its name decides
# its line.
FLOW = [
    ["__version__", "config.errors", "runtime.process"],
    ["config.datasets", "config.hints", "config.model"],
    ["config.tile_maps"],
    ["config.data", "config.devices", "config.evaluation", "config.training"],
    ["config.experiment"],
    ["config"],
    [
        "axes",
        "sharding",
        "structs",
        "config.bounds",
        "config.checks",
        "cost.chips",
        "runtime.lfs",
    ],
    ["config.validate"],
    ["config.files"],
    ["runtime"],
    ["data"],
    ["nn"],
    ["hub", "testing"],
    ["cost"],
    ["train"],
    ["plan"],
    ["infer"],
    ["serve"],
    ["demo"],
    ["cli"],
    ["__main__"],
    ["study"],
]
FORBIDDEN = {  # package of ours: packages that it must not import
    "": {"torch", "transformers", "tensorflow"},
    "nn": {
        "optax",
        "orbax",
        "grain",
        "tokenizers",
        "tensorflow_datasets",
        "vlm_jax.data",
        "vlm_jax.train",
    },
    "data": {"jax", "flax", "optax", "vlm_jax.nn", "vlm_jax.train"},
    "config": {"jax", "flax", "numpy"},
    "hub": {"vlm_jax.train"},
}
MOST_FILES = {"": 6}  # directly in a package; the default is MOST_FILES_OF_A_PACKAGE
MOST_FILES_OF_A_PACKAGE = 22
MASKS = {"segment_ids", "branch_ids", "image_token_index", "image_mask"}


def module_name(path: Path) -> str:
    """'nn.vlm' for vlm_jax/nn/vlm.py, 'nn' for vlm_jax/nn/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_under(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def position(name: str) -> int:
    """Line of FLOW that a module belongs to."""
    matches = [
        (len(prefix), i) for i, line in enumerate(FLOW) for prefix in line if is_under(name, prefix)
    ]
    assert matches, f"vlm_jax.{name} has no line in FLOW"
    return max(matches)[1]


def own_imports(path: Path) -> set[str]:
    return {name.removeprefix("vlm_jax.") for name in imports(path) if is_under(name, "vlm_jax")}


def test_the_files_are_found():
    assert {"nn.vlm", "data.text", "cli.main", "train.loop"} <= {
        module_name(path) for path in FILES
    }


def test_imports_point_only_backwards():
    forward = []
    for path in FILES:
        name = module_name(path)
        if name:
            forward += [
                (name, other) for other in own_imports(path) if position(other) > position(name)
            ]
    assert not forward


def test_no_two_files_import_each_other_in_a_circle():
    names = {module_name(path) for path in FILES}
    needs = {}
    for path in FILES:
        targets = {
            other if other in names else other.rpartition(".")[0] for other in own_imports(path)
        }
        needs[module_name(path)] = targets - {"", module_name(path)}
    while needs:
        free = {name for name, targets in needs.items() if not targets & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: targets for name, targets in needs.items() if name not in free}


def test_a_package_does_not_import_what_it_must_not():
    violations = []
    for path in FILES:
        for package, forbidden in FORBIDDEN.items():
            if is_under(module_name(path), package):
                violations += [
                    (path.name, name)
                    for name in imports(path)
                    for root in forbidden
                    if is_under(name, root)
                ]
    assert not violations


def test_a_package_has_no_more_files_than_a_reader_can_take_in():
    crowded = {}
    for folder in {path.parent for path in FILES}:
        name = ".".join(folder.relative_to(PACKAGE).parts)
        count = len(list(folder.glob("*.py")))
        if count > MOST_FILES.get(name, MOST_FILES_OF_A_PACKAGE):
            crowded[name] = count
    assert not crowded


def test_only_axes_and_sharding_name_partition_spec():
    users = {module_name(path) for path in FILES if "PartitionSpec" in path.read_text()}
    assert users == {"axes", "sharding"}


def test_masks_are_made_in_fusion_alone():
    """No other module of the model reads the fields that decide which token attends to which."""
    readers = set()
    for path in FILES:
        if is_under(module_name(path), "nn"):
            attributes = {
                node.attr for node in ast.walk(syntax_tree(path)) if isinstance(node, ast.Attribute)
            }
            if attributes & MASKS:
                readers.add(module_name(path))
    assert readers <= {"nn.fusion", "nn.vlm"}
