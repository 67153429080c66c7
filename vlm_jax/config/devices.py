"""The sections `mesh` and `distributed`: devices and processes that train together."""

import math
import re
from dataclasses import dataclass

from vlm_jax.config.errors import ConfigError


def factorizations(number: int) -> list[tuple[int, int, int]]:
    """Every (a, b, c) whose product is the number, the largest a first."""
    divisors = [d for d in range(number, 0, -1) if number % d == 0]
    return [(a, b, number // (a * b)) for a in divisors for b in divisors if number % (a * b) == 0]


@dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices for data parallelism; -1: all remaining
    fsdp: int = 1  # devices that shard rows and parameters; -1: all remaining
    tensor: int = 1  # devices for tensor parallelism; -1: all remaining

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Returns the sizes of the mesh axes, with -1 replaced by the remaining devices.

        Raises:
          ConfigError: the sizes do not multiply to the number of devices.
        """
        axes = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in axes if size != -1)
        free = axes.count(-1)
        positive = all(size > 0 for size in axes if size != -1)
        if free <= 1 and positive and devices % known == 0 and (free or known == devices):
            return tuple(devices // known if size == -1 else size for size in axes)
        nearest = sorted(
            factorizations(devices), key=lambda sizes: sum(a != b for a, b in zip(sizes, axes))
        )
        # The nearest first, which keep most of the given sizes.
        choices = [" x ".join(map(str, sizes)) for sizes in nearest[:12]]
        if len(nearest) > 12:
            choices.append("or another")
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, axes))} does not fit "
            f"{devices} device(s): the three must multiply to {devices}, and at most one may be -1 "
            "(all remaining): choose "
            f"{', '.join(choices)}."
        )


@dataclass(frozen=True)
class Distributed:
    """Processes that train together; on TPU VMs, GKE and Slurm they are found automatically."""

    coordinator_address: str = ""  # HOST:PORT of process 0
    #: number of processes; None: from the cluster, or one without a cluster; 1: no other process
    num_processes: int | None = None
    process_id: int | None = None  # index of this process, from 0; None: from the cluster
    timeout_seconds: int = 300  # how long processes wait for each other at the start
    #: a process that is silent for this long is declared dead, and the run ends
    heartbeat_seconds: int = 60

    def check(self) -> None:
        """Raises ConfigError for fields that are incomplete or contradict each other."""
        address, count, index = self.coordinator_address, self.num_processes, self.process_id
        if count == 1 and not address and not index:
            return
        named = {
            "coordinator_address": bool(address),
            "num_processes": count is not None,
            "process_id": index is not None,
        }
        missing = [f"distributed.{name}" for name, is_given in named.items() if not is_given]
        if len(missing) == len(named):
            return
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
                "distributed.coordinator_address, distributed.num_processes and "
                "distributed.process_id are set together, or left out on a cluster that sets them."
            )
        _, _, port = address.rpartition(":")
        if not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", address) or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"distributed.coordinator_address {address!r} is not HOST:PORT, "
                "such as 10.0.0.2:8476."
            )
        if index >= count:
            raise ConfigError(
                f"distributed.process_id {index} is not in 0 to {count - 1} "
                f"(distributed.num_processes {count})."
            )
