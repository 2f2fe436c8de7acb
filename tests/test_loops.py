"""Every Loop through one battery: what the harness and its users rely on."""

import hashlib
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax import unroll
from metax.harness import NonFiniteError, record_run, replicate, train
from tests.loops import LOOPS

NUM_STEPS = 6
# Each compiles for ten seconds and more in every test below.
LARGE = {"amalgamation", "imitation", "autoloss", "autoloss_online"}


@pytest.fixture(params=LOOPS)
def name(request):
    return request.param


# Where a test starts a process, those that compile soon are enough for each push.
LEFT_OUT = {*LARGE, "epochs", "replicate", "grid"}


def but_for(few):
    """All loops, those few where there is time."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in few else [])
        for name in LOOPS
    ]


@pytest.fixture(params=but_for(LARGE))
def small(request):
    """For tests that large loops take only where there is time."""
    return request.param


@pytest.fixture(params=but_for(LEFT_OUT))
def single(request):
    """For tests that start a process."""
    return request.param


def digest(tree) -> str:
    """Of every leaf's path, dtype and bytes."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}".encode())
        total.update(leaf.tobytes())
    return total.hexdigest()


def keys(num_steps=NUM_STEPS):
    return jax.random.split(jax.random.key(1), num_steps)


def test_step_keeps_tree_shapes_dtypes_and_weak_types(name):
    loop, data = LOOPS[name].build(), LOOPS[name].data()
    before = jax.eval_shape(loop.init, jax.random.key(0))
    after, _ = jax.eval_shape(loop.step, before, jax.random.key(1), data)
    signature = lambda tree: jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), tree
    )
    assert signature(before) == signature(after)


def test_scan_equals_steps(small):
    loop, data = LOOPS[small].build(), LOOPS[small].data()
    start = loop.init(jax.random.key(0))
    scanned, infos = unroll(loop, start, keys(), data)
    state, step, seen = start, jax.jit(loop.step), []
    for key in keys():
        state, info = step(state, key, data)
        seen.append(info)
    chex.assert_trees_all_close(state, scanned, rtol=1e-12)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
    chex.assert_trees_all_close(stacked, infos, rtol=1e-12)


def test_vmap_over_seeds_equals_single_runs(small):
    loop, data = LOOPS[small].build(), LOOPS[small].data()
    several = replicate(loop, 2)
    key_init, key_step = jax.random.split(jax.random.key(3))
    together, _ = several.step(several.init(key_init), key_step, data)
    for s in range(2):
        key, other = (jax.random.split(k, 2)[s] for k in (key_init, key_step))
        alone, _ = loop.step(loop.init(key), other, data)
        mine = jax.tree.map(lambda leaf, s=s: leaf[s], together)
        # batched contractions may sum in another order
        chex.assert_trees_all_close(mine, alone, rtol=1e-9)


def test_keys_decide_everything(small):
    loop, data = LOOPS[small].build(), LOOPS[small].data()
    run = lambda seed: digest(train(loop, data, jax.random.key(seed), 2)[0])
    assert run(0) == run(0) != run(1)


def test_one_trace_whatever_the_number_of_chunks(small):
    loop, data = LOOPS[small].build(), LOOPS[small].data()
    traces = []

    def step(state, key, data):
        traces.append(1)
        return loop.step(state, key, data)

    train(loop._replace(step=step), data, jax.random.key(0), NUM_STEPS, chunk=1)
    assert len(traces) == 1


def test_resumed_in_a_new_process_equals_uninterrupted_bit_for_bit(single, tmp_path):
    name = single
    whole, _ = run_until(name, tmp_path / "whole", NUM_STEPS)
    run_until(name, tmp_path / "parts", NUM_STEPS // 2)
    command = [sys.executable, "-W", "error", "-m", "tests.test_loops", name]
    done = subprocess.run(
        [*command, str(tmp_path / "parts")],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(whole)
    rows = [
        (tmp_path / part / "metrics.jsonl").read_text() for part in ("whole", "parts")
    ]
    assert rows[0] == rows[1]


def test_nonfinite_step_is_reported_and_stops_the_run(small):
    loop, poison = LOOPS[small].build(), LOOPS[small].poison()
    with pytest.raises(NonFiniteError, match="step 0 is not finite"):
        train(loop, poison, jax.random.key(0), NUM_STEPS)


@pytest.mark.slow
def test_loops_spread_over_devices_equal_vmapped():
    """All loops at once, in a process of its own that has eight virtual devices."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.sharded_loops"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[::2] == [*LOOPS, "rollouts", "tasks"]


def run_until(name, folder, num_steps):
    loop, data = LOOPS[name].build(), LOOPS[name].data()
    return record_run(
        folder, loop, data, jax.random.key(0), num_steps, chunk=1, resume=True
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(digest(run_until(sys.argv[1], Path(sys.argv[2]), NUM_STEPS)[0]))
