"""Run as a program, in one process of two devices or in two of one: spread runs.

`python -m tests.spread_runs FILE` writes what came out of them. With the variables of
`start_processes` set it is one of several processes, of which the first writes.
"""

import os
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metax import Loop
from metax.harness import (
    device_mesh,
    evaluate,
    grid,
    shard,
    start_devices,
    start_processes,
    train,
)
from metax.harness.processes import all_on_host, is_first

NUM_STEPS = 6


class Info(NamedTuple):
    x: jax.Array
    is_finite: jax.Array


def walk(rate) -> Loop:
    """x ← rate·x + noise + mean of the data; at 100 and above it is not finite."""

    def step(x, key, data):
        x = rate * x + 0.1 * jax.random.normal(key, x.shape) + data.mean()
        x = jnp.where(jnp.abs(x) >= 100, jnp.nan, x)
        return x, Info(x.sum(), jnp.isfinite(x).all())

    return Loop(lambda key: jax.random.normal(key, (3,)), step)


def rollouts(number) -> Loop:
    """Runs from new keys at every step, of which the state keeps a mean alone."""

    def one(key, start):
        noise = jax.random.normal(key, (7,))
        return jax.lax.scan(lambda x, e: (jnp.sin(x) + e, None), start, noise)[0]

    def step(mean, key, data):
        ends = jax.vmap(one, (0, None))(jax.random.split(key, number), mean)
        return ends.mean(), ends

    return Loop(lambda key: jnp.zeros(()), step)


def runs(mesh):
    """What is compared: two grids, spread by seed and by setting, and rollouts."""
    key, data = jax.random.key(0), np.arange(3.0)
    rates, seen = jnp.array([0.5, 5.0]), []
    look = lambda step, states, infos: seen.append(all_on_host(states))
    by_seed = evaluate(
        grid(walk, rates), data, key, NUM_STEPS,
        num_seeds=4, chunk=2, mesh=mesh, on_chunk=look,
    )  # fmt: skip
    by_setting = evaluate(grid(walk, rates, mesh=mesh), data, key, 2, num_seeds=1)
    loop = rollouts(4)
    loop = loop if mesh is None else shard(loop, mesh, 4)
    inside = train(loop, data, key, NUM_STEPS, chunk=2)
    return all_on_host((by_seed, tuple(seen), by_setting, inside))


def main(path) -> None:
    jax.config.update("jax_enable_x64", True)
    several = "JAX_NUM_PROCESSES" in os.environ
    if several:
        start_processes()
    start_devices(1 if several else 2)
    mesh = device_mesh()
    assert mesh.size == 2
    found = runs(mesh)
    if is_first():
        np.savez(path, *jax.tree.leaves(found))


if __name__ == "__main__":
    main(sys.argv[1])
