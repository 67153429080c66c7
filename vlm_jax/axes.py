"""Logical axis names: one letter per dimension, and the mesh axis that it is split over.

A letter has two columns, because the width of a parameter is split over `fsdp` and the width of an
activation is not. An unknown letter raises KeyError: a misspelled axis never means "replicated".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from flax.linen import meta
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from vlm_jax import config

MESH_AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that the rows of a batch are split over

# A CPU that need not be there: tracing on it starts no backend.
ABSTRACT_CPU = AbstractMesh(
    (1, 1, 1),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
    abstract_device=jax.sharding.AbstractDevice("cpu", None, "cpu"),
)


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
    "Q": Axis("learned queries of the projector; registers of the image encoder"),
    "R": Axis("rotary dimensions of a head; rows of a resampled grid"),
    "A": Axis("rank of a LoRA adapter", parameter="fsdp"),
    "L": Axis("layers, stacked"),
    "D": Axis("hidden width of the decoder or of the transformer at hand", parameter="fsdp"),
    "E": Axis("hidden width of the image encoder, as input of the projector", parameter="fsdp"),
    "N": Axis("attention heads", parameter="tensor", activation="tensor"),
    "K": Axis("key/value heads", parameter="tensor", activation="tensor"),
    "G": Axis("attention heads that share a key/value head"),
    "H": Axis("head dim"),
    "F": Axis("hidden width of an MLP", parameter="tensor", activation="tensor"),
    "V": Axis("vocabulary", parameter="tensor", activation="tensor"),
    "W": Axis("width of the contrastive embeddings of images and texts"),
    "1": Axis("a dimension of one"),
}
STACKED = "L"
# Parts in which a gradient is summed over devices (`sum_rows`).
SUMMED_PARTS = 4


def parameter_spec(letters: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the spec of a parameter such as `D N H`.

    The first letter that names a mesh axis gets it; later letters with the same axis are whole.
    """
    return partition_spec([ALPHABET[letter].parameter for letter in letters.split()], shape, mesh)


def activation_spec(letters: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the spec of an activation such as `B S D`."""
    return partition_spec([ALPHABET[letter].activation for letter in letters.split()], shape, mesh)


def partition_spec(
    mesh_axes: Sequence[str | tuple[str, ...] | None], shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
    """Returns the spec that splits every dimension over its mesh axes where their size divides it.

    Other dimensions (a single key/value head, an odd vocabulary) stay whole.
    """
    if len(mesh_axes) != len(shape):
        raise ValueError(f"{len(mesh_axes)} letters for an array of shape {shape}")
    used, spec = set(), []
    for axis, size in zip(mesh_axes, shape):
        names = {axis} if isinstance(axis, str) else set(axis or ())
        shards = math.prod(mesh.shape[name] for name in names)
        if names and not used & names and size % shards == 0:
            spec.append(axis)
            used |= names
        else:
            spec.append(None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Constrains the sharding of an activation on the mesh of `jax.set_mesh`, if one is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(letters, x.shape, mesh))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Constrains an array (B, ...) to be split by rows alone."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def shard_mapped(function: Callable, letters: Sequence[str], out: str) -> Callable:
    """Returns `function`, applied by every device to its shard: for kernels XLA cannot partition.

    Args:
      letters: logical axes of each argument.
      out: logical axes of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def mapped(*arrays):
        in_specs = tuple(activation_spec(names, x.shape, mesh) for names, x in zip(letters, arrays))
        out_specs = activation_spec(out, jax.eval_shape(function, *arrays).shape, mesh)
        sharded = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return sharded(*arrays)

    return mapped


def embedding_lookup(table: jax.Array, ids: jax.Array, letters: str) -> jax.Array:
    """Returns table[ids]: (V, D) and (B, S) -> (B, S, D).

    Every device looks up the ids of all rows in its own shard of the table, and the devices
    exchange what they found: neither the table nor its gradient is ever whole. With more ids than
    the table has rows, the table itself is the smaller thing to send, and is whole in D.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take(table, ids, axis=0)
    ids_spec = activation_spec("B S", ids.shape, mesh)
    vocab_axis, width_axis = parameter_spec(letters, table.shape, mesh)
    if ids_spec[0] is None or ids.size // row_shards(mesh) > len(table):
        width_axis = None

    def lookup_in_shard(table, ids):
        if width_axis is not None:
            ids = jax.lax.all_gather(ids, width_axis, tiled=True)
        x = _lookup_in_shard_of_rows(table, ids, vocab_axis)
        if width_axis is None:
            return x
        return jax.lax.all_to_all(x, width_axis, split_axis=0, concat_axis=2, tiled=True)

    in_specs = (PartitionSpec(vocab_axis, width_axis), ids_spec)
    out_specs = activation_spec("B S D", (*ids.shape, table.shape[1]), mesh)
    return jax.shard_map(lookup_in_shard, in_specs=in_specs, out_specs=out_specs)(table, ids)


def _lookup_in_shard_of_rows(table, ids, vocab_axis):
    """Looks ids up in a table whose rows are split over `vocab_axis`, or whole if it is None."""
    if vocab_axis is None:
        return jnp.take(table, ids, axis=0)
    ids = ids - jax.lax.axis_index(vocab_axis) * len(table)
    is_mine = (ids >= 0) & (ids < len(table))
    x = jnp.take(table, jnp.where(is_mine, ids, 0), axis=0)
    return jax.lax.psum(jnp.where(is_mine[..., None], x, 0), vocab_axis)


def sum_rows(x: jax.Array, letters: str) -> jax.Array:
    """Sums (B, ...) over B; every device keeps its shard of a parameter with axes `letters`.

    In parts along an axis that every device has whole: XLA for TPUs holds the whole sum of each
    part before a device keeps its shard of it (an all-reduce and a slice, libtpu 0.0.42).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.sum(x, axis=0)
    spec = parameter_spec(letters, x.shape[1:], mesh)
    shards = [1 if name is None else mesh.shape[name] for name in spec]

    def sum_into_shards(part):
        return jax.lax.with_sharding_constraint(jnp.sum(part, axis=0), spec)

    if max(shards) == 1 or 1 not in shards:
        return sum_into_shards(x)
    whole_axis = shards.index(1)
    parts = jnp.array_split(x, SUMMED_PARTS, axis=1 + whole_axis)
    return jnp.concatenate([sum_into_shards(part) for part in parts], axis=whole_axis)


class Partitioned(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter with its logical axes; `nn.scan` puts `L` in front when it stacks layers.

    `contracted` is the number of axes, after `L`, that the product with a kernel sums over; the
    axes after them are its outputs. 0: not a kernel. `is_table` is set for embedding tables.
    """

    value: jax.Array
    letters: str = struct.field(pytree_node=False)
    contracted: int = struct.field(pytree_node=False, default=0)
    is_table: bool = struct.field(pytree_node=False, default=False)

    @property
    def is_kernel(self) -> bool:
        return self.contracted > 0

    @property
    def contracted_axes(self) -> tuple[int, ...]:
        """Positions of a kernel's axes that its product sums over."""
        first = self.letters.split().count(STACKED)
        return tuple(range(first, first + self.contracted))

    @property
    def output_axes(self) -> tuple[int, ...]:
        """Positions of a kernel's axes that its product leaves."""
        letters = self.letters.split()
        return tuple(range(letters.count(STACKED) + self.contracted, len(letters)))

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


def with_axes(init: Callable, letters: str, contracted: int = 0, is_table: bool = False):
    """Returns an initializer that boxes its parameter with logical axes (see `Partitioned`)."""

    def boxed(key, shape, *rest):
        if len(shape) != len(letters.split()):
            raise ValueError(f"letters {letters!r} for a parameter of shape {shape}")
        return Partitioned(init(key, shape, *rest), letters, contracted, is_table)

    return boxed


def make_mesh(cfg: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh `data x fsdp x tensor`; a size of -1 takes the devices that are left.

    Args:
      devices: None: all devices of all processes.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or JAX_PLATFORMS names a
        platform that this machine does not have.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:
        raise config.ConfigError(f"{error}") from None
    sizes = cfg.sizes(len(devices))
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def single_device_mesh(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """Returns a mesh of one device, of the same kind as the devices of `mesh`."""
    device = mesh.abstract_device
    return AbstractMesh(
        (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device
    )


def platform() -> str:
    """Returns the platform to compile for, `cpu`, `gpu` or `tpu`.

    The mesh of `jax.set_mesh` decides; this machine need not have its devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def row_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Returns the number of shards of a batch's rows; `mesh` None: the mesh of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def round_up_to_shards(count: int, mesh: Mesh) -> int:
    """Returns the smallest multiple of `row_shards` that is at least `count`."""
    shards = row_shards(mesh)
    return -(-count // shards) * shards
