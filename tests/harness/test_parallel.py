import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.harness import (
    device_mesh,
    evaluate,
    first_non_finite,
    grid,
    put_everywhere,
    replicate,
    shard,
    spread,
    start_devices,
    start_processes,
    train,
)
from metax.harness.parallel import check_share
from tests.spread_runs import NUM_STEPS, rollouts, runs, walk

KEY = jax.random.key(0)


class Eight:
    """As much of a mesh as the doors look at."""

    size = 8
    axis_names = ("device",)
    shape = {"device": 8}  # noqa: RUF012


def start(path, **variables):
    """The program of spread runs, in a process of its own."""
    environment = {**os.environ, **variables}
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.spread_runs", str(path)],
        cwd=Path(__file__).parents[2], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(process):
    try:
        text, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, text


def results(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


def test_two_devices_equal_one(tmp_path):
    program = start(tmp_path / "found.npz")
    wanted = runs(None)
    end(program)
    found = jax.tree.unflatten(
        jax.tree.structure(wanted), results(tmp_path / "found.npz")
    )
    # two replicates a device and four on one are programs of their own
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
    jax.tree.map(close, found, wanted)
    # the second setting of each replicate froze, whichever device it was on
    (_, infos), *_ = found
    first = first_non_finite(infos)
    assert (first[:, 0] == -1).all()
    assert (first[:, 1] > 0).all()
    assert np.isnan(infos.x[:, -1, 1]).all()


@pytest.mark.slow
def test_two_processes_equal_one_with_two_devices(tmp_path):
    """Over loopback, bit for bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    pair = [
        start(tmp_path / f"{i}.npz", JAX_PROCESS_ID=str(i), **variables)
        for i in range(2)
    ]
    for process in [*pair, start(tmp_path / "one.npz")]:
        end(process)
    assert not (tmp_path / "1.npz").exists()
    two, one = results(tmp_path / "0.npz"), results(tmp_path / "one.npz")
    assert len(two) == len(one) > 0
    for a, b in zip(two, one, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["replicate", "grid"])
def test_a_mesh_of_one_device_changes_no_bit(kind):
    rates = jnp.array([0.5, 0.9])
    build = {
        "replicate": lambda mesh: replicate(walk(0.5), 2, mesh=mesh),
        "grid": lambda mesh: grid(walk, rates, mesh=mesh),
    }[kind]
    run = lambda mesh: train(build(mesh), np.ones(2), KEY, NUM_STEPS, chunk=2)
    jax.tree.map(np.testing.assert_array_equal, run(device_mesh(1)), run(None))


def test_the_state_says_where_it_lies_before_it_is_made():
    """For `restore_checkpoint`, which puts what it reads where `like` says."""
    mesh = device_mesh(1)
    for loop in (replicate(walk(0.5), 2, mesh=mesh), shard(rollouts(2), mesh, 2)):
        like, state = jax.eval_shape(loop.init, KEY), loop.init(KEY)
        assert like.sharding == state.sharding
        assert like.sharding.mesh.axis_names == ("device",)


@pytest.mark.parametrize("traced", ["replicate", "shard"])
def test_chunks_are_compiled_once(traced):
    mesh, traces = device_mesh(1), []
    plain = rollouts(2)

    def step(state, key, data):
        traces.append(1)
        return plain.step(state, key, data)

    loop = plain._replace(step=step)
    loop = replicate(loop, 2, mesh=mesh) if traced == "replicate" else shard(
        loop, mesh, 2
    )  # fmt: skip
    train(loop, put_everywhere(np.ones(3), mesh), KEY, NUM_STEPS, chunk=1)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("door", "said"),
    [
        (lambda: replicate(walk(1.0), 6, mesh=Eight()), r"replicate\(num_seeds=...\)"),
        (lambda: grid(walk, np.ones(6), mesh=Eight()), r"grid\(settings=...\)"),
        (lambda: shard(walk(1.0), Eight(), 6), r"shard\(size=...\)"),
        (lambda: check_share("f(x=...)", 6, Eight()), r"f\(x=...\)"),
    ],
)
def test_an_axis_that_the_devices_do_not_divide_is_refused(door, said):
    with pytest.raises(ValueError, match=said + ".*got 6 on 8 devices"):
        door()


def test_evaluate_refuses_seeds_that_the_devices_do_not_divide():
    with pytest.raises(ValueError, match="got 6 on 8 devices"):
        evaluate(walk(1.0), np.ones(2), KEY, 1, num_seeds=6, mesh=Eight())


def test_a_size_that_no_leaf_has_is_refused():
    loop = shard(rollouts(4), device_mesh(1), 5)
    with pytest.raises(
        ValueError, match=r"shard\(size=...\).*size=5, found \[\(4,\)\]"
    ):
        train(loop, None, KEY, 1)


def test_devices_that_are_not_there_are_refused():
    has = jax.local_device_count()
    for ask in (device_mesh, start_devices):
        for number in (0, has + 1):
            with pytest.raises(ValueError, match=f"from 1 to the {has} cpu.*{number}"):
                ask(number)


def test_processes_that_nobody_counts_are_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS.*JAX_PROCESS_ID"):
        start_processes()


def test_data_stay_where_they_are_without_a_mesh():
    data = {"x": np.ones(3)}
    assert put_everywhere(data, None) is data
    (leaf,) = jax.tree.leaves(put_everywhere(data, device_mesh(1)))
    assert leaf.sharding.is_fully_replicated


def test_spread_is_vmap():
    add = lambda x, y, z: x * y + z
    arrays = jnp.arange(3.0), 2.0, jnp.ones(3)
    wanted = jax.vmap(add, (0, None, 0))(*arrays)
    found = spread(add, (0, None, 0), device_mesh(1))(*arrays)
    np.testing.assert_array_equal(found, wanted)
