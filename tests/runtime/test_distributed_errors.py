"""Processes that cannot train together: each ends with one sentence."""

import socket

import pytest

from tests.runtime.processes import begin, ended, fields, free_address, pair

# A run that fails early: the model does not matter.
SMALL = ["--fusion.kind", "unified", "--vision.tiles", "1", "--vision.image_size_px", "64"]
SMALL += ["--train.steps", "2", "--eval.max_examples", "8"]
FAILING = """
import sys
from vlm_jax.cli.main import main
from vlm_jax.config import ConfigError
from vlm_jax.infer import evaluate
from vlm_jax.train import loop

where, mine, failing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module, name = {
    "step": (loop, "log_step"),
    "answer": (evaluate, "answer"),
    "end": (evaluate, "prediction_lines"),
}[where]
function = getattr(module, name)

def fail(*arguments):
    if mine == failing and (where != "step" or arguments[1].step == 1):
        raise ERROR
    return function(*arguments)

setattr(module, name, fail)
raise SystemExit(main(sys.argv[4:]))
"""
BROKEN, NO_DISK = (
    "ConfigError('image 7.jpg is broken.')",
    "OSError(28, 'No space left on device', '7.jpg')",
)
ALONE = [
    pytest.param("step", 0, "TypeError('7.jpg is None')", 1, id="TypeError in a step"),
    pytest.param("answer", 1, BROKEN, 2, id="ConfigError in the evaluation"),
    pytest.param(
        "step", 0, BROKEN, 2, id="ConfigError in a step, process 0", marks=pytest.mark.slow
    ),
    pytest.param(
        "step", 1, BROKEN, 2, id="ConfigError in a step, process 1", marks=pytest.mark.slow
    ),
    pytest.param("step", 1, NO_DISK, 1, id="OSError in a step", marks=pytest.mark.slow),
    pytest.param(
        "step", 1, "KeyboardInterrupt()", 130, id="Ctrl-C in a step", marks=pytest.mark.slow
    ),
    pytest.param("end", 0, NO_DISK, 1, id="OSError after the evaluation", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("where, failing, error, expected", ALONE)
def test_where_one_process_fails_alone_all_end_with_a_sentence(
    where, failing, error, expected, arguments, tmp_path
):
    """Soon, with the same exit code, and none of them is aborted."""
    address, code = free_address(), FAILING.replace("ERROR", error)
    fixed = [*arguments(tmp_path / "run"), *SMALL]
    running = []
    for i in range(2):
        own = fields(address, i, heartbeat_seconds=30)
        running.append(begin(["-c", code, where, i, failing, *fixed, *own]))
    results = [ended(process) for process in running]
    assert [code for code, _, _ in results] == [expected, expected], results
    own, other = results[failing][2], results[1 - failing][2]
    message = own.splitlines()[-1]
    assert ("7.jpg" in message) == (expected != 130)
    assert other == f"error: process {failing} ended: {message.removeprefix('error: ')}\n"
    assert ("Traceback" in own) == ("TypeError" in error)


def assert_refused(result, *message):
    code, out, err = result
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "a sentence, not a page"
    for words in message:
        assert words in err


def test_processes_with_different_configs_are_refused_on_both_sides_and_nothing_is_written(
    arguments, tmp_path
):
    results = pair(arguments(tmp_path / "run"), [], ["--seed", "3", "--mesh.fsdp", "2"])
    for result in results:
        assert_refused(
            result, "process 1 was started with another config", "seed: 0 -> 3", "mesh.fsdp: 1 -> 2"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "index, message",
    [(0, "not all of the 2 processes"), (1, "could not be reached within 1 seconds")],
)
def test_who_waits_in_vain_gives_up_with_a_sentence(index, message, arguments, tmp_path):
    address = free_address()
    process = begin(["run.py", *arguments(tmp_path / "run"), *fields(address, index, seconds=1)])
    assert_refused(ended(process), message, address)
    assert not (tmp_path / "run").exists()


def test_where_the_port_is_taken_process_0_says_so(arguments, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = ended(begin(["run.py", *arguments(tmp_path / "run"), *fields(address, 0)]))
    assert_refused(
        result,
        f"distributed.coordinator_address {address}",
        "Address already in use",
        "another port",
    )
    assert not (tmp_path / "run").exists()
