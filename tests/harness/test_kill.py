"""Runs that are killed again and again, at random moments, and go on each time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from metax.harness import (
    latest_step,
    mean_rows,
    read_metrics,
    restore_checkpoint,
    train,
)
from tests.loops import LOOPS
from tests.test_loops import digest

ROOT = Path(__file__).parents[2]
KILLS = 100  # over all loops
# A life ends up to so many steps, and then seconds, after its first step. Seconds alone
# would not do: the first save of a process, which imports Orbax, takes long.
STEPS, SECONDS = 8, 0.1
ENDLESS = 10**6


def start(name, folder, num_steps, cache):
    """A process that goes on with the run, a checkpoint a step; programs are kept."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-W", "error", "-m", "tests.killed_loops", name]
    return subprocess.Popen(
        [*command, str(folder), str(num_steps)],
        cwd=ROOT, env={**os.environ, **kept}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill_once(name, folder, cache, rng):
    """Kills a process at a random moment after its first step."""
    with start(name, folder, ENDLESS, cache) as process:
        lines = [process.stdout.readline() for _ in range(rng.integers(STEPS) + 1)]
        time.sleep(rng.uniform(0, SECONDS))
        process.kill()
        _, trouble = process.communicate()
    assert lines[-1].strip().isdecimal(), trouble
    assert process.returncode == -signal.SIGKILL, trouble


def check_kills(name, num_kills, tmp_path):
    """Kills, looks at what is left, and compares the end with that of a whole run."""
    folder, key = tmp_path / "run", jax.random.key(0)
    loop, data = LOOPS[name].build(), LOOPS[name].data()
    like = jax.eval_shape(loop.init, key)
    rng, before, rests = np.random.default_rng(list(name.encode())), 0, []
    for _ in range(num_kills):
        kill_once(name, folder, tmp_path / "cache", rng)
        step = latest_step(folder / "checkpoints") or before
        if step:
            assert restore_checkpoint(folder / "checkpoints", like)[0] == step
        assert step >= before
        before = step
        rests += [path.suffix for path in (folder / "checkpoints").iterdir()]
    num_steps = before + 2
    with start(name, folder, num_steps, tmp_path / "cache") as process:
        said, trouble = process.communicate()
    assert process.returncode == 0, trouble

    rows = []
    state, _ = train(
        loop, data, key, num_steps, chunk=1,
        on_chunk=lambda step, state, infos: rows.extend(mean_rows(step, state, infos)),
    )  # fmt: skip
    assert said.split()[-1] == digest(state)
    assert read_metrics(folder) == rows
    print(f"{name}: {num_kills} kills, {num_steps} steps, {rests.count('.tmp')} halves")


def test_run_killed_three_times_ends_as_if_it_had_not_been(tmp_path):
    check_kills("inner_loop", 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_loop_killed_many_times_ends_as_if_it_had_not_been(name, tmp_path):
    check_kills(name, -(-KILLS // len(LOOPS)), tmp_path)
