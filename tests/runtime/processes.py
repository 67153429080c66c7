"""Processes of `run.py` that train together, and the experiment of their tests."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.limits import LIMIT_SECONDS
from vlm_jax.config import Data, Eval, Train
from vlm_jax.testing import hybrid_in_tiles, on_easy_vqa

ROOT = Path(__file__).parents[2]
CONFIG = """
from tests.runtime.processes import experiment

def get_config():
    return experiment()
"""


def experiment():
    """Six steps of a hybrid on 40 images of easy-VQA, saved after steps 2, 4 and 6."""
    cfg = on_easy_vqa(hybrid_in_tiles())
    return replace(
        cfg,
        data=replace(cfg.data, augment=Data().augment),
        train=Train(steps=6, batch_size=8, log_every_steps=1, checkpoint_every_steps=2),
        eval=Eval(max_examples=12, batch_size=8, max_new_tokens=2),
    )


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def begin(arguments, devices=4, **environment):
    """Starts a process with this number of CPU devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process) -> tuple[int, str, str]:
    """Returns (exit code, stdout, stderr), without gloo's lines about connections."""
    try:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
    # Two of gloo's threads may write into each other's lines.
    gloo = ("[Gloo]", "connected peer ranks")
    out, err = (
        "".join(x for x in text.splitlines(True) if not any(message in x for message in gloo))
        for text in (out, err)
    )
    return process.returncode, out, err


def fields(address, index, seconds=LIMIT_SECONDS, heartbeat_seconds=LIMIT_SECONDS):
    given = {
        "coordinator_address": address,
        "num_processes": 2,
        "process_id": index,
        "timeout_seconds": seconds,
        "heartbeat_seconds": heartbeat_seconds,
    }
    return [part for name, value in given.items() for part in (f"--distributed.{name}", value)]


def pair(arguments, *of_each):
    """Runs two processes of `run.py`; `of_each`: arguments of each alone."""
    address = free_address()
    extras = of_each or ([], [])
    running = [begin(["run.py", *arguments, *fields(address, i), *extras[i]]) for i in range(2)]
    return [ended(process) for process in running]
