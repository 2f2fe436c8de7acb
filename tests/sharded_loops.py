"""Run as a program: replicates of every Loop, spread over eight virtual devices.

Two replicates a device, so that every product keeps its batch axis. Eight devices give
bit for bit what two give that run the same shares. One `vmap` over all sixteen on one
device is another program: XLA's products of 2 and of 16 columns are different code, and
programs for several devices go through other passes. There the last bits may differ;
for each loop is printed whether they do.

The devices themselves are alike: the program of one device gives a share the same bits
on each, so it is the compiler that makes the difference, and not where something runs.

After that the two loops with an axis within a step, of eight rollouts and eight tasks.
"""

import sys

import jax
import numpy as np

from metax import Loop, unroll
from metax.amalgamation import amalgamate, pool, rnnprop
from metax.autoloss import autoloss, controller, features
from metax.harness import (
    device_mesh,
    put_everywhere,
    replicate,
    shard,
    spread,
    start_devices,
)
from tests.loops import LOOPS
from tests.loops import _alternating as alternating
from tests.loops import _regression as regression

NUM_DEVICES, NUM_SEEDS, NUM_STEPS = 8, 16, 3


def keys():
    """For `init`, and for the steps."""
    return jax.random.key(0), jax.random.split(jax.random.key(1), NUM_STEPS)


def run(several: Loop, data):
    """Three steps of sixteen replicates: states and infos."""
    key_init, key_steps = keys()
    state = jax.jit(several.init)(key_init)
    return jax.jit(lambda *args: unroll(several, *args))(state, key_steps, data)


def two_by_two(loop: Loop, data):
    """The same on two devices, four replicates at a time, put together afterwards."""
    width = 2 * NUM_SEEDS // NUM_DEVICES
    pair = device_mesh(2)
    init = jax.jit(spread(loop.init, (0,), pair))
    step = spread(loop.step, (0, 0, None), pair)

    @jax.jit
    def walk(state, keys, data):
        return jax.lax.scan(lambda state, key: step(state, key, data), state, keys)

    split = jax.vmap(lambda key: jax.random.split(key, NUM_SEEDS))
    keys_init, keys_steps = split(keys()[0][None])[0], split(keys()[1])
    parts = []
    for first in range(0, NUM_SEEDS, width):
        mine = slice(first, first + width)
        part = walk(init(keys_init[mine]), keys_steps[:, mine], data)
        parts.append(jax.device_get(part))
    states, infos = zip(*parts, strict=True)
    return joined(0, states), joined(1, infos)


def alone(loop: Loop, data, device):
    """The last share by itself, by the program of one device."""
    mine = slice(NUM_SEEDS - NUM_SEEDS // NUM_DEVICES, NUM_SEEDS)
    split = jax.vmap(lambda key: jax.random.split(key, NUM_SEEDS)[mine])
    step = jax.vmap(loop.step, (0, 0, None))
    walk = jax.jit(
        lambda state, keys, data: jax.lax.scan(
            lambda state, key: step(state, key, data), state, keys
        )
    )
    key_init, key_steps, data = jax.device_put((*keys(), data), device)
    state = jax.jit(jax.vmap(loop.init))(split(key_init[None])[0])
    return jax.device_get(walk(state, split(key_steps), data))


def joined(axis, trees):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis), *trees)


def check(name, wanted, got, rtol):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(got), strict=True
    ):
        what = f"{name}{jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(b, a, rtol=rtol, err_msg=what)


def rollouts() -> Loop:
    seen = features.running_norm(features.released("regression"))
    options = {"features": seen, "num_steps": 4, "num_rollouts": 8, "chunk": 2}
    return autoloss(alternating(full_batch=True), controller(2, (4,)), **options)


def tasks() -> Loop:
    options = {"truncation_length": 2, "unroll_length": 4, "num_tasks": 8}
    return amalgamate(
        regression(), rnnprop(4, 1), pool("small"), reduce="minmax", **options
    )


def work(loop: Loop, data):
    """Three steps, and the operations of one device for one."""
    key_init, key_steps = keys()
    state = loop.init(key_init)
    step = jax.jit(loop.step).lower(state, key_steps[0], data).compile()
    walk = jax.jit(lambda *args: unroll(loop, *args))
    found = jax.device_get(walk(state, key_steps, data))
    return found, step.cost_analysis()["flops"]


def check_inside(name: str, loop: Loop, mesh) -> None:
    """A quarter of the operations at most: what is not of the axis all devices do."""
    data = LOOPS["inner_loop"].data()
    wanted, alone = work(loop, data)
    found, shared = work(shard(loop, mesh, 8), put_everywhere(data, mesh))
    # sums over the axis are made device by device
    check(name, wanted, found, rtol=1e-9)
    assert shared < alone / 4, (name, shared, alone)
    print(name, "divided", flush=True)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    start_devices(NUM_DEVICES)
    mesh = device_mesh()
    for name in sys.argv[1:] or LOOPS:
        loop, data = LOOPS[name].build(), LOOPS[name].data()
        several = replicate(loop, NUM_SEEDS, mesh=mesh)
        found = run(several, put_everywhere(data, mesh))
        leaf = jax.tree.leaves(found[0])[0]
        assert len(leaf.sharding.device_set) == NUM_DEVICES
        assert leaf.addressable_shards[0].data.shape[0] == NUM_SEEDS // NUM_DEVICES
        found = jax.device_get(found)
        check(name, two_by_two(loop, data), found, rtol=0)
        first, *_, last = jax.devices()
        check(name, alone(loop, data, first), alone(loop, data, last), rtol=0)
        whole = jax.device_get(run(replicate(loop, NUM_SEEDS), data))
        check(name, whole, found, rtol=1e-10)
        same = jax.tree.map(np.array_equal, whole, found)
        print(name, "equal" if all(jax.tree.leaves(same)) else "rounded", flush=True)
    if not sys.argv[1:]:
        check_inside("rollouts", rollouts(), mesh)
        check_inside("tasks", tasks(), mesh)


if __name__ == "__main__":
    main()
