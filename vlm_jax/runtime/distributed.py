"""Several processes that train one model, each on its own devices, on one or on several machines.

`jax.distributed` connects them. Its own failures end a process with a C++ stack dump, so that
whatever can be known before is checked here, and a wait that times out ends with one sentence.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import replace

import jax
import numpy as np

# JAX has no public API to detect a cluster, nor for the coordinator's key-value store.
from jax._src import clusters
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from vlm_jax.config import (
    ConfigError,
    Distributed,
    Experiment,
    UserError,
    files,
)
from vlm_jax.runtime.process import exit_now

# Fields that may differ between the processes of a run.
PER_PROCESS_FIELDS = ("distributed.", "data.dir")
# Process 0 exits this much later than the others: without their coordinator they print long dumps.
FAREWELL_SECONDS = 3
POLL_SECONDS = 0.5  # between two checks whether another process failed
# In the coordinator's store: one key for every process that failed alone.
FAILURES = "vlm_jax/failures/"

_exit_lock = threading.Lock()  # held by the thread that ends this process


def start(cfg: Experiment) -> None:
    """Connects the processes of a run, if it has several; afterwards process 0 alone prints.

    Must be called before a device is used. Without `distributed` fields the processes come from
    the TPU VMs, GKE, Slurm or Open MPI. If they do not all connect in
    `distributed.timeout_seconds`, the process ends with exit code 2.

    Raises:
      ConfigError: the coordinator cannot be reached, or the processes have different configs.
    """
    cluster = resolve_cluster(cfg.distributed)
    if cluster.num_processes <= 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's service would take SIGTERM from `runtime.preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    with _timeout(cluster):
        if cluster.process_id:
            _await_coordinator(cluster)
        else:
            _refuse_taken_port(cluster)
        _join(cluster)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _watch_others()
    check_same(cfg)


def resolve_cluster(cfg: Distributed) -> Distributed:
    """Returns the coordinator, the number of processes and this one's id.

    From the fields, or else from the environment of a cluster; without a cluster, one process.

    Raises:
      ConfigError: the environment describes a cluster incompletely.
    """
    if cfg.num_processes:
        return cfg
    try:
        address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, cfg.timeout_seconds
        )
    # An incomplete environment makes JAX raise any exception.
    except Exception as error:
        raise ConfigError(
            f"the environment describes a cluster incompletely ({error}): set "
            "distributed.coordinator_address, distributed.num_processes and "
            "distributed.process_id, or distributed.num_processes 1."
        ) from error
    if not count:
        return replace(cfg, num_processes=1, process_id=0)
    return replace(cfg, coordinator_address=address, num_processes=count, process_id=index)


def _refuse_taken_port(cfg: Distributed) -> None:
    """Raises ConfigError if process 0 cannot listen at its port: XLA would crash."""
    port = int(cfg.coordinator_address.rpartition(":")[2])
    has_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=has_both).close()
    except OSError as error:
        raise ConfigError(
            f"distributed.coordinator_address {cfg.coordinator_address}: process 0 cannot listen "
            f"at port {port} of this machine ({error.strerror}): choose another port."
        ) from None


def _await_coordinator(cfg: Distributed) -> None:
    host, _, port = cfg.coordinator_address.rpartition(":")
    address = (host.strip("[]"), int(port))
    deadline = time.monotonic() + cfg.timeout_seconds
    while True:
        seconds_left = deadline - time.monotonic()
        try:
            socket.create_connection(address, timeout=max(seconds_left, 0.1)).close()
            return
        except OSError as error:
            if seconds_left < 1:
                reason = error.strerror or error
                raise ConfigError(
                    f"distributed.coordinator_address {cfg.coordinator_address} could not be "
                    f"reached within {cfg.timeout_seconds} seconds ({reason}): process 0 has to "
                    "run there."
                ) from None
            time.sleep(0.5)


def _join(cfg: Distributed) -> None:
    try:
        jax.distributed.initialize(
            cfg.coordinator_address,
            cfg.num_processes,
            cfg.process_id,
            initialization_timeout=cfg.timeout_seconds + 10 * FAREWELL_SECONDS,
            heartbeat_timeout_seconds=cfg.heartbeat_seconds,
            shutdown_timeout_seconds=cfg.heartbeat_seconds,
        )
        jax.process_count()  # waits until every process has announced its devices
    except RuntimeError as error:
        raise ConfigError(
            f"the processes of distributed.coordinator_address could not be connected: {error}"
        ) from error


@contextlib.contextmanager
def _timeout(cfg: Distributed):
    """Ends this process if the others do not connect in time.

    JAX waits for them in C++, where no exception can interrupt it.
    """

    def give_up():
        print(
            f"error: not all of the {cfg.num_processes} processes (distributed.num_processes) "
            f"connected to distributed.coordinator_address {cfg.coordinator_address} within "
            f"{cfg.timeout_seconds} seconds (distributed.timeout_seconds), or two have the same "
            "distributed.process_id.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    # Process 0 gives up last: the others would lose their coordinator.
    margin_seconds = FAREWELL_SECONDS if cfg.process_id else 2 * FAREWELL_SECONDS
    timer = threading.Timer(cfg.timeout_seconds + margin_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_same(cfg: Experiment) -> None:
    """Raises ConfigError on every process if the config of one differs from process 0's.

    `PER_PROCESS_FIELDS` may differ.
    """
    texts = _gather(files.to_json(cfg).encode())
    configs = [files.from_json(text, "config") for text in texts]
    for index, other in enumerate(configs):
        lines = files.differences(configs[0], other)
        if other.workdir != configs[0].workdir:
            lines.append(f"workdir: {configs[0].workdir} -> {other.workdir}")
        lines = [line for line in lines if not line.startswith(PER_PROCESS_FIELDS)]
        if lines:
            raise ConfigError(
                f"process {index} was started with another config than process 0: "
                f"{'; '.join(lines)}."
            )


def _gather(data: bytes) -> list[bytes]:
    """Returns the data of all processes, in their order."""
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.frombuffer(data.ljust(int(sizes.max()), b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes)]


@contextlib.contextmanager
def raise_on_all():
    """Barrier that raises on every process if the body raised UserError or OSError on any of them.

    Raises:
      ConfigError: the error of this process, or else of the first other process that has one.
      OSError: of a file of this process; the others raise ConfigError.
    """
    own_error = None
    try:
        yield
    except (UserError, OSError) as error:
        own_error = error
    messages = []
    if jax.process_count() > 1:
        messages = _gather(str(own_error or "").encode())
    if own_error is not None:
        raise _mark_known_to_all(own_error)
    for index, message in enumerate(messages):
        if message:
            raise _mark_known_to_all(ConfigError(f"process {index}: {message.decode()}"))


def _mark_known_to_all(error: Exception) -> Exception:
    """Marks an error that every process raises at the same point."""
    error.on_all_processes = True
    return error


def is_alone(error: BaseException) -> bool:
    """Returns True if the other processes of the run do not know the error of this one.

    An error that all processes raise has the attribute `on_all_processes`.
    """
    return global_state.client is not None and not getattr(error, "on_all_processes", False)


def leave_alone(code: int, message: str) -> None:
    """Prints the message and ends this process; the others end with the same code and message."""
    with _exit_lock:
        print(message, file=sys.stderr, flush=True)
        # In a thread: a lost coordinator would never answer.
        thread = threading.Thread(target=_report_failure, args=(code, message), daemon=True)
        thread.start()
        thread.join(FAREWELL_SECONDS)
        _exit_after_others(code)


def _report_failure(code: int, message: str) -> None:
    index = jax.process_index()
    failure = json.dumps([index, code, message])
    # Without a coordinator the other processes end by themselves.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        global_state.client.key_value_set(f"{FAILURES}{index}", failure)


def _exit_after_others(code: int) -> None:
    """Ends this process; process 0 last, because processes without a coordinator are aborted."""
    if not jax.process_index():
        time.sleep(FAREWELL_SECONDS)
    exit_now(code)


def _watch_others() -> None:
    """Ends this process soon after another one called `leave_alone`.

    In a thread, because the main thread may be waiting for that process in C++.
    """
    stopped = threading.Event()

    def watch():
        while not stopped.wait(POLL_SECONDS):
            try:
                failures = global_state.client.key_value_dir_get(FAILURES)
            except jax.errors.JaxRuntimeError:  # the coordinator is lost
                return
            if failures:
                index, code, message = json.loads(failures[0][1])
                with _exit_lock:
                    message = message.removeprefix("error: ")
                    print(f"error: process {index} ended: {message}", file=sys.stderr, flush=True)
                    _exit_after_others(code)

    def stop():
        stopped.set()
        thread.join(FAREWELL_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    atexit.register(stop)  # runs before JAX closes its connection


def finish() -> None:
    """Waits for all processes, so that the failure of one still reaches the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("finished")
