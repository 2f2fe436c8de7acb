import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from metax.harness import latest_step, read_metrics, restore_checkpoint
from metax.harness.processes import (
    agree,
    all_on_host,
    is_first,
    is_single,
    wait_for_all,
    whole,
)
from tests.several_processes import SEED, build_loop
from tests.test_loops import digest

ROOT = Path(__file__).parents[2]


def test_one_process_asks_nobody():
    assert (is_single(), is_first(), agree(3)) == (True, True, 3)
    wait_for_all("nobody")
    assert whole(np.ones(2)).tolist() == [1.0, 1.0]
    assert isinstance(all_on_host({"a": jax.numpy.ones(2)})["a"], np.ndarray)


def start(count, *phases):
    """What each of the processes says, and the exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-W", "error", "-m", "tests.several_processes", port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, str(rank), str(count), *phases], cwd=ROOT, **pipes)
        for rank in range(count)
    ]
    try:
        results = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [
        [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        for out, _ in results
    ]
    return said, [process.returncode for process in processes], results


@pytest.mark.slow
def test_checkpoints_go_between_one_process_and_two(tmp_path):
    a, b, c = (str(tmp_path / name) for name in "abc")
    said, codes, results = start(1, f"run:{b}:6", f"run:{c}:4")
    assert codes == [0], results
    wanted, at_four = said[0]

    said, codes, results = start(2, f"run:{a}:4", f"run:{c}:6")
    assert codes == [0, 0], results
    assert said == [[at_four, wanted]] * 2, "two processes equal one"

    # one process on one device reads what two have written
    like = jax.eval_shape(build_loop().init, jax.random.key(SEED))
    step, state = restore_checkpoint(tmp_path / "a" / "checkpoints", like)
    assert (step, digest(state)) == (4, at_four)

    said, codes, results = start(1, f"run:{a}:6")
    assert codes == [0], results
    assert said == [[wanted]]
    rows = [read_metrics(run) for run in (a, b, c)]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.slow
def test_the_first_process_writes_and_the_others_read_what_it_wrote(tmp_path):
    said, codes, results = start(2, f"files:{tmp_path / 'run'}")
    assert codes == [0, 0], results
    for line, reason in zip(
        (said[0][0], said[1][0]), ("Is a directory", "another process"), strict=True
    ):
        assert line.startswith("{'rank': 0} [{'step': 1, 'rank': 0}]")
        assert reason in line


@pytest.mark.slow
def test_what_one_process_meets_all_are_told(tmp_path):
    (tmp_path / "full").mkdir()
    said, codes, results = start(
        2, f"full:{tmp_path / 'full'}", f"signal:{tmp_path / 'run'}"
    )
    assert codes == [143, 143], results
    assert said[0] == ["No space left on device"]
    assert said[1] == ["another process could not write its part"]
    assert read_metrics(tmp_path / "full") == [{"step": 1}]
    assert latest_step(tmp_path / "full") == 1
    assert latest_step(tmp_path / "run" / "checkpoints") == 2
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
