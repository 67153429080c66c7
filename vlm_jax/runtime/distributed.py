"""Several processes that train one model, each on devices of its own: on one machine, or on every one of a slice.

`jax.distributed` joins them. What goes wrong in it ends a process with a stack dump of C++, so whatever can be known
before is checked here, and a wait that is in vain ends with a sentence.
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
from jax._src import clusters  # nothing public says whether there is a cluster
from jax._src.distributed import global_state  # nothing public gives the processes' common store
from jax.experimental import multihost_utils

from vlm_jax.config import (
    ConfigError,
    Distributed,
    Experiment,
    UserError,
    files,
)
from vlm_jax.runtime.process import exit_now

PER_PROCESS_FIELDS = (
    "distributed.",
    "data.dir",
)  # fields that may differ between the processes of a run
# Process 0 waits longer by so much: the others lose their coordinator with it, and say so at length.
FAREWELL_SECONDS = 3
POLL_SECONDS = 0.5  # how often a process asks whether another one failed
FAILURES = "vlm_jax/failures/"  # in the store of the coordinator: a key for every process that failed alone

_leaving = threading.Lock()  # held by the thread that ends this process


def start(cfg: Experiment) -> None:
    """Joins the run's other processes, if there are any, before a device is used; from then on process 0 alone prints.

    Where `distributed` names none, TPU VMs, GKE, Slurm and Open MPI say which there are. Where those do not come in
    `distributed.timeout_seconds`, the process ends with exit code 2.

    Raises:
      ConfigError: the coordinator cannot be reached, or the processes were started with different configs.
    """
    found = resolve_cluster(cfg.distributed)
    if found.num_processes <= 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # it would take SIGTERM from `train.preemption`
    with _patience(found):
        if found.process_id:
            _await_coordinator(found)
        else:
            _refuse_taken_port(found)
        _join(found)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _watch_others()
    check_same(cfg)


def resolve_cluster(cfg: Distributed) -> Distributed:
    """The fields as given, or as the cluster says that this process is part of; one process where there is none."""
    if cfg.num_processes:
        return cfg
    try:
        address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, cfg.timeout_seconds
        )
    except Exception as error:  # whatever an environment that is half a cluster makes JAX raise
        raise ConfigError(
            f"this looks like a part of a cluster, but does not say of which ({error}): set "
            "distributed.coordinator_address, distributed.num_processes and distributed.process_id, or "
            "distributed.num_processes 1."
        ) from error
    if not count:
        return replace(cfg, num_processes=1, process_id=0)
    return replace(cfg, coordinator_address=address, num_processes=count, process_id=index)


def _refuse_taken_port(cfg: Distributed) -> None:
    """Raises ConfigError where process 0 cannot await the others at its port: XLA would end it with a crash."""
    port, both = int(cfg.coordinator_address.rpartition(":")[2]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ConfigError(
            f"distributed.coordinator_address {cfg.coordinator_address}: process 0 cannot await the others at port "
            f"{port} of this machine ({error.strerror}): choose another port."
        ) from None


def _await_coordinator(cfg: Distributed) -> None:
    host, _, port = cfg.coordinator_address.rpartition(":")
    until = time.monotonic() + cfg.timeout_seconds
    while True:
        left = until - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(left, 0.1)).close()
            return
        except OSError as error:
            if left < 1:
                reason = error.strerror or error
                raise ConfigError(
                    f"distributed.coordinator_address {cfg.coordinator_address} could not be reached within "
                    f"{cfg.timeout_seconds} seconds ({reason}): process 0 has to run there."
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
        jax.process_count()  # waits until every process has said which devices it has
    except RuntimeError as error:
        raise ConfigError(
            f"the processes of distributed.coordinator_address could not be joined: {error}"
        ) from error


@contextlib.contextmanager
def _patience(cfg: Distributed):
    """Ends this process where the others do not come in time: JAX waits in C++, where no exception can reach."""

    def give_up():
        print(
            f"error: not all of the {cfg.num_processes} processes (distributed.num_processes) came to "
            f"distributed.coordinator_address {cfg.coordinator_address} within {cfg.timeout_seconds} seconds "
            "(distributed.timeout_seconds), or two came with the same distributed.process_id.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(
        cfg.timeout_seconds + FAREWELL_SECONDS * (1 if cfg.process_id else 2), give_up
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_same(cfg: Experiment) -> None:
    """Raises ConfigError on every process where one has another config than process 0; `PER_PROCESS_FIELDS` may differ."""
    others = [files.from_json(text, "config") for text in _gathered(files.to_json(cfg).encode())]
    for index, other in enumerate(others):
        lines = files.differences(others[0], other)
        if other.workdir != others[0].workdir:
            lines.append(f"workdir: {others[0].workdir} -> {other.workdir}")
        lines = [line for line in lines if not line.startswith(PER_PROCESS_FIELDS)]
        if lines:
            raise ConfigError(
                f"process {index} was started with another config than process 0: {'; '.join(lines)}."
            )


def _gathered(mine: bytes) -> list[bytes]:
    """What every process hands in, in their order."""
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.frombuffer(mine.ljust(int(sizes.max()), b"\0"), np.uint8)
    return [
        row[:size].tobytes() for row, size in zip(multihost_utils.process_allgather(padded), sizes)
    ]


@contextlib.contextmanager
def raise_on_all():
    """What one process refuses inside, all refuse, and none goes on before all are through.

    Raises:
      ConfigError: that of this process, or the first of the others'.
      OSError: a file of this process; the others raise ConfigError.
    """
    own = None
    try:
        yield
    except (UserError, OSError) as error:
        own = error
    said = _gathered(str(own or "").encode()) if jax.process_count() > 1 else []
    if own is not None:
        raise _known_to_all(own)
    for index, text in enumerate(said):
        if text:
            raise _known_to_all(ConfigError(f"process {index} says: {text.decode()}"))


def _known_to_all(error: Exception) -> Exception:
    """Marks an error that every process raises at this point."""
    error.on_all_processes = True
    return error


def is_alone(error: BaseException) -> bool:
    """Returns whether this process has an error that the other processes of the run do not know.

    An error that all processes raise has the attribute `on_all_processes`.
    """
    return global_state.client is not None and not getattr(error, "on_all_processes", False)


def leave_alone(code: int, message: str) -> None:
    """Prints the message and ends this process; the others end with the same code and a sentence."""
    with _leaving:
        print(message, file=sys.stderr, flush=True)
        told = threading.Thread(target=_tell_others, args=(code, message), daemon=True)
        told.start()  # a coordinator that is lost would never answer
        told.join(FAREWELL_SECONDS)
        _leave_after_others(code)


def _tell_others(code: int, message: str) -> None:
    index = jax.process_index()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is lost
        global_state.client.key_value_set(f"{FAILURES}{index}", json.dumps([index, code, message]))


def _leave_after_others(code: int) -> None:
    """Ends this process; process 0 last, since a process that loses its coordinator is aborted."""
    if not jax.process_index():
        time.sleep(FAREWELL_SECONDS)
    exit_now(code)


def _watch_others() -> None:
    """Ends this process soon after another one called `leave_alone`, also where it waits for that one in C++."""
    ended = threading.Event()

    def watch():
        while not ended.wait(POLL_SECONDS):
            try:
                failures = global_state.client.key_value_dir_get(FAILURES)
            except jax.errors.JaxRuntimeError:  # the coordinator is lost
                return
            if failures:
                index, code, message = json.loads(failures[0][1])
                with _leaving:
                    message = message.removeprefix("error: ")
                    print(f"error: process {index} ended: {message}", file=sys.stderr, flush=True)
                    _leave_after_others(code)

    def stop():
        ended.set()
        thread.join(FAREWELL_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    atexit.register(stop)  # before JAX closes its connection


def finish() -> None:
    """Waits until all processes are done, so that the failure of one still reaches the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("finished")
