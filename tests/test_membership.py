"""The processes of a cluster, and the rows of each."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from vlm_jax import axes, sharding
from vlm_jax.config import Distributed, Mesh, UserError
from vlm_jax.config.validate import validate
from vlm_jax.runtime import distributed
from vlm_jax.testing import tiny


@pytest.mark.parametrize(
    "fields, message",
    [
        (Distributed("host:1", 2), "distributed.process_id is missing"),
        (
            Distributed(num_processes=2),
            "distributed.coordinator_address and distributed.process_id are missing",
        ),
        (
            Distributed(process_id=0),
            "distributed.coordinator_address and distributed.num_processes are missing",
        ),
        (Distributed("host:1", 2, 2), "distributed.process_id 2 is not in 0 to 1"),
        (Distributed("host", 2, 0), "'host' is not HOST:PORT"),
        (Distributed("host:99999", 2, 0), "'host:99999' is not HOST:PORT"),
        (Distributed("host:1", 2, 0, 0), "distributed.timeout_seconds is 0"),
        (Distributed("host:1", 2, -2), "distributed.process_id is -2"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        validate(replace(tiny(), distributed=fields))


SLURM = {
    "JOB_ID": "7",
    "STEP_NODELIST": "node[003-004]",
    "NTASKS": "2",
    "PROCID": "1",
    "LOCALID": "0",
}


def test_the_processes_of_slurm_find_each_other_without_fields(monkeypatch):
    assert distributed.resolve_cluster(Distributed()).num_processes == 1, "no cluster: one process"
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    cluster = distributed.resolve_cluster(Distributed())
    assert (
        cluster.coordinator_address.split(":")[0],
        cluster.num_processes,
        cluster.process_id,
    ) == (
        "node003",
        2,
        1,
    )
    assert distributed.resolve_cluster(Distributed(num_processes=1)).num_processes == 1, (
        "unless one alone is asked for"
    )


@pytest.fixture
def tpu_vm(monkeypatch):
    """A TPU VM whose metadata server answers from the dict."""
    metadata = {}
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(
        cloud_tpu_cluster,
        "get_metadata",
        lambda key: (metadata.get(key, ""), 200 if key in metadata else 404),
    )
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    return metadata


def test_the_machines_of_a_tpu_slice_find_each_other_without_fields(tpu_vm):
    tpu_vm |= {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:0:127.0.0.1,b:1:127.0.0.2",
    }
    cluster = distributed.resolve_cluster(Distributed())
    assert (
        cluster.coordinator_address.split(":")[0],
        cluster.num_processes,
        cluster.process_id,
    ) == (
        "127.0.0.1",
        2,
        1,
    )


def test_the_pods_of_gke_find_each_other_without_fields(tpu_vm, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "127.0.0.1,127.0.0.2,127.0.0.3")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    cluster = distributed.resolve_cluster(Distributed())
    assert (
        cluster.coordinator_address.split(":")[0],
        cluster.num_processes,
        cluster.process_id,
    ) == (
        "127.0.0.1",
        3,
        2,
    )


def test_one_process_holds_all_rows():
    assert sharding.share_of_rows(axes.make_mesh(Mesh(2, 2, 2))) == (0, 1)


@pytest.mark.parametrize("rows", [8, 6])
def test_rows_are_placed_as_they_are_split_or_whole(rows):
    mesh = axes.make_mesh(Mesh(2, 2, 2))
    placed = sharding.place_rows({"x": np.arange(rows * 3).reshape(rows, 3)}, mesh)["x"]
    np.testing.assert_array_equal(placed, np.arange(rows * 3).reshape(rows, 3))
    assert {shard.data.shape for shard in placed.addressable_shards} == {
        (2, 3) if rows == 8 else (6, 3)
    }
    assert jax.process_count() == 1
