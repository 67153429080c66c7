"""The alphabet: one letter per dimension, and the mesh axis it lies on.

The only file that says `PartitionSpec`. A letter has two columns, because the width of a parameter is split over
`fsdp` while the width of an activation is not. An unknown letter is a KeyError: a misspelt axis must never mean
"replicated".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from flax.linen import meta
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax import config

MESH_AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that the rows of a batch are split over


@dataclass(frozen=True)
class Axis:
    meaning: str
    parameter: str | None = None
    activation: str | tuple[str, ...] | None = None


ALPHABET = {
    "B": Axis("batch: rows", activation=ROWS),
    "I": Axis("images of a row, or with tiles all their views"),
    "J": Axis("views of an image: tiles, thumbnail; ways to lay tiles out"),
    "S": Axis("sequence: tokens of a row"),
    "T": Axis("keys that a sequence attends to (cached ones included)"),
    "P": Axis("patches of an image"),
    "C": Axis("numbers of a patch: height x width x channels"),
    "M": Axis("image tokens that leave the projector"),
    "Q": Axis("learned queries of the resampler"),
    "R": Axis("numbers of a head that RoPE turns; rows of a resampled grid"),
    "L": Axis("layers, stacked"),
    "D": Axis("width of a decoder or of the transformer at hand", parameter="fsdp"),
    "E": Axis("width of the image encoder where it meets D", parameter="fsdp"),
    "N": Axis("attention heads", parameter="tensor", activation="tensor"),
    "K": Axis("key/value heads", parameter="tensor", activation="tensor"),
    "G": Axis("attention heads that share a key/value head"),
    "H": Axis("numbers of a head"),
    "F": Axis("hidden numbers of an MLP", parameter="tensor", activation="tensor"),
    "V": Axis("vocabulary", parameter="tensor", activation="tensor"),
    "W": Axis("numbers of the vectors in which images and texts are compared"),
    "1": Axis("a dimension of one"),
}


def parameter_spec(letters: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter such as `D N H` lies on the mesh. A mesh axis is used once, by the first letter that wants it."""
    return _spec([ALPHABET[letter].parameter for letter in letters.split()], shape, mesh)


def activation_spec(letters: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How an activation such as `B S D` lies on the mesh."""
    return _spec([ALPHABET[letter].activation for letter in letters.split()], shape, mesh)


def _spec(wanted, shape, mesh) -> PartitionSpec:
    """A dimension that the mesh axis does not divide (one key/value head, an odd vocabulary) is kept whole."""
    if len(wanted) != len(shape):
        raise ValueError(f"{len(wanted)} letters for an array of shape {shape}")
    used, spec = set(), []
    for axis, size in zip(wanted, shape):
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        split = math.prod(mesh.shape[name] for name in names)
        free = names and not used & set(names) and size % split == 0
        spec.append(axis if free else None)
        used |= set(names) if free else set()
    return PartitionSpec(*spec)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pins an activation to its place on the mesh of `jax.set_mesh`; without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(letters, x.shape, mesh))


def constrain_rows(x: jax.Array) -> jax.Array:
    """The same for an array of rows, whatever else its dimensions are."""
    return (
        x
        if jax.sharding.get_abstract_mesh().empty
        else jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))
    )


def shard_mapped(function: Callable, letters: Sequence[str], out: str) -> Callable:
    """`function` of arrays with these letters, on every device for its share: for kernels that XLA cannot split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def split(*arrays):
        specs = tuple(activation_spec(names, x.shape, mesh) for names, x in zip(letters, arrays))
        shape = jax.eval_shape(function, *arrays).shape
        out_specs = activation_spec(out, shape, mesh)
        return jax.shard_map(function, in_specs=specs, out_specs=out_specs, check_vma=False)(
            *arrays
        )

    return split


def platform() -> str:
    """What computes: `cpu`, `gpu` or `tpu`; the devices of the mesh of `jax.set_mesh` need not be there."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def single_device_mesh(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """A mesh of one device of the kind that `mesh` has."""
    axis_types = (AxisType.Auto,) * 3
    return AbstractMesh(
        (1, 1, 1), MESH_AXES, axis_types=axis_types, abstract_device=mesh.abstract_device
    )


def row_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Parts that the rows of a batch are split into on a mesh, by default that of `jax.set_mesh`; without one 1."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def round_up_to_shards(count: int, mesh: Mesh) -> int:
    """At least `count` rows, and as many in each of the `row_shards`."""
    shards = row_shards(mesh)
    return -(-count // shards) * shards


def lookup(table: jax.Array, ids: jax.Array, letters: str) -> jax.Array:
    """table[ids], for instance (V, D) and (B, S) -> (B, S, D): every device looks up its own rows in its share of V.

    Left to itself XLA splits the gradient of `take` by the table's D and gathers all rows of the batch for it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take(table, ids, axis=0)
    shape = (*ids.shape, table.shape[1])
    table_spec = activation_spec(letters, table.shape, mesh)
    split = table_spec[0]

    def local(table, ids):
        if split is None:
            return jnp.take(table, ids, axis=0)
        ids = ids - jax.lax.axis_index(split) * len(table)
        is_mine = (ids >= 0) & (ids < len(table))
        found = jnp.take(table, jnp.where(is_mine, ids, 0), axis=0)
        return jax.lax.psum(jnp.where(is_mine[..., None], found, 0), split)

    specs = (table_spec, activation_spec("B S", ids.shape, mesh))
    return jax.shard_map(local, in_specs=specs, out_specs=activation_spec("B S D", shape, mesh))(
        table, ids
    )


class Partitioned(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter together with its letters; `nn.scan` puts `L` in front when it stacks layers."""

    value: jax.Array
    letters: str = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index, params):
        letters = self.letters.split()
        letters.insert(index, params[meta.PARTITION_NAME])
        return self.replace(letters=" ".join(letters))

    def remove_axis(self, index, params):
        letters = self.letters.split()
        letters.pop(index)
        return self.replace(letters=" ".join(letters))


def with_axes(init, letters: str):
    """An initializer whose parameter remembers its letters."""

    def boxed(key, shape, *rest):
        if len(shape) != len(letters.split()):
            raise ValueError(f"letters {letters!r} for a parameter of shape {shape}")
        return Partitioned(init(key, shape, *rest), letters)

    return boxed


def parameter_shardings(abstract_params, mesh: Mesh):
    """Tree of boxed parameters (or their shapes) -> tree of shardings, one per parameter."""

    def sharding(box: Partitioned):
        return NamedSharding(mesh, parameter_spec(box.letters, box.value.shape, mesh))

    return jax.tree.map(sharding, abstract_params, is_leaf=lambda x: isinstance(x, Partitioned))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Whole rows, split over `data` and `fsdp`: where every array of a batch lies."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of so many equal shares of a batch's rows this process holds.

    Processes hold the same share where `tensor` reaches over them.

    Raises:
      ConfigError: the rows of two processes are neither the same nor apart.
    """
    shards = row_shards(mesh)
    held: dict[int, set[int]] = {}
    for device, (rows,) in row_sharding(mesh).devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, shares)) != shards or len({len(share) for share in shares}) > 1:
        raise config.ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, mesh.shape.values()))} cuts rows between "
            "processes unevenly: mesh.tensor must divide the devices of a process, or be a multiple of them."
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def place_rows(tree, mesh: Mesh):
    """Arrays that every process has whole, laid out by rows; where the rows do not divide, whole on every device."""

    def placed(x):
        spec = _spec([ROWS] + [None] * (x.ndim - 1), x.shape, mesh)
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda index: x[index]
        )

    return jax.tree.map(placed, tree)


def place_own_rows(tree, mesh: Mesh):
    """Arrays of which every process has its own share of the rows, laid out by rows."""
    rows = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), tree)


def per_device_sharding(mesh: Mesh) -> NamedSharding:
    """A vector with one number on every device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def make_mesh(cfg: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all there are) as `data x fsdp x tensor`; -1 stands for what is left.

    Raises:
      ConfigError: the three do not multiply to the number of devices, or there is no device of JAX_PLATFORMS.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:
        raise config.ConfigError(f"{error}") from None
    return jax.make_mesh(
        cfg.sizes(len(devices)), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )
