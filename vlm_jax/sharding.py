"""Shardings of whole arrays on a mesh: parameters by their logical axes, batches by rows."""

import jax
from flax.linen import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax import axes
from vlm_jax.config import ConfigError


def parameter_shardings(abstract_params, mesh: Mesh, stored=None):
    """Returns one sharding per parameter of a tree of boxed ones (`axes.Partitioned`).

    Args:
      stored: the same tree with, instead of each box, the shape of its array or a tree of the
        shapes of several, which have the box's logical axes; None: the shapes in the boxes.
    """

    def shardings(box: axes.Partitioned, shapes):
        def sharding(x):
            return NamedSharding(mesh, axes.parameter_spec(box.letters, x.shape, mesh))

        return jax.tree.map(sharding, shapes)

    def is_box(x):
        return isinstance(x, axes.Partitioned)

    stored = meta.unbox(abstract_params) if stored is None else stored
    return jax.tree.map(shardings, abstract_params, stored, is_leaf=is_box)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's arrays (B, ...): rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(axes.ROWS))


def per_device_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a vector with one element on every device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process holds the index-th of `count` equal shares of the rows.

    Processes hold the same share where `tensor` spans several of them.

    Raises:
      ConfigError: the rows of two processes overlap without being the same.
    """
    shards = axes.row_shards(mesh)
    rows_of_process: dict[int, set[int]] = {}
    for device, (rows,) in row_sharding(mesh).devices_indices_map((shards,)).items():
        rows_of_process.setdefault(device.process_index, set()).add(rows.start or 0)
    shares = sorted({tuple(sorted(rows)) for rows in rows_of_process.values()})
    sizes = {len(share) for share in shares}
    if len(sizes) > 1 or sum(map(len, shares)) != shards:
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, mesh.shape.values()))} "
            "splits rows between processes unevenly: mesh.tensor must divide the devices of a "
            "process, or be a multiple of them."
        )
    own_share = tuple(sorted(rows_of_process[jax.process_index()]))
    return shares.index(own_share), len(shares)


def place_rows(tree, mesh: Mesh):
    """Lays out, by rows, arrays that every process holds whole.

    Where the mesh does not divide the rows, the array is replicated.
    """

    def place(x):
        spec = axes.partition_spec([axes.ROWS] + [None] * (x.ndim - 1), x.shape, mesh)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def place_own_rows(tree, mesh: Mesh):
    """Lays out, by rows, arrays whose own share (`share_of_rows`) every process holds."""
    rows = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), tree)


def abstract_own_rows(tree, mesh: Mesh):
    """Returns shapes and shardings of the arrays that `place_own_rows` makes."""
    _, shares = share_of_rows(mesh)
    rows = row_sharding(mesh)

    def describe(x):
        shape = (len(x) * shares, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=rows)

    return jax.tree.map(describe, tree)
