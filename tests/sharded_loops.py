"""Run as a program: replicates of every Loop, spread over eight virtual devices.

Two replicates a device, so that every product keeps its batch axis. What a device
computes is, bit for bit, what `vmap` over its share alone gives. One `vmap` over all
sixteen is another program: XLA's products of 2 and of 16 columns are different code,
and the last bits differ wherever there is a product.
"""

import sys

import jax
import numpy as np

from metax import Loop, unroll
from metax.harness import device_mesh, put_everywhere, replicate, start_devices
from tests.loops import LOOPS

NUM_DEVICES, NUM_SEEDS, NUM_STEPS = 8, 16, 3


def keys():
    """For `init`, and for the steps."""
    return jax.random.key(0), jax.random.split(jax.random.key(1), NUM_STEPS)


def run(several: Loop, data):
    """Three steps of sixteen replicates: states and infos."""
    key_init, key_steps = keys()
    state = jax.jit(several.init)(key_init)
    return jax.jit(lambda *args: unroll(several, *args))(state, key_steps, data)


def share_by_share(loop: Loop, data):
    """The same, each share by itself on one device, put together afterwards."""
    width = NUM_SEEDS // NUM_DEVICES
    split = jax.vmap(lambda key: jax.random.split(key, NUM_SEEDS))
    keys_init, keys_steps = split(keys()[0][None])[0], split(keys()[1])
    init = jax.jit(jax.vmap(loop.init))
    step = jax.vmap(loop.step, (0, 0, None))

    @jax.jit
    def walk(state, keys, data):
        return jax.lax.scan(lambda state, key: step(state, key, data), state, keys)

    parts = []
    for first in range(0, NUM_SEEDS, width):
        mine = slice(first, first + width)
        part = walk(init(keys_init[mine]), keys_steps[:, mine], data)
        parts.append(jax.device_get(part))
    states, infos = zip(*parts, strict=True)
    return joined(0, states), joined(1, infos)


def joined(axis, trees):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis), *trees)


def same(name, wanted, got, rtol=0.0):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(got), strict=True
    ):
        what = f"{name}{jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(
            np.asarray(b), np.asarray(a), rtol=rtol, err_msg=what
        )


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    start_devices(NUM_DEVICES)
    mesh = device_mesh()
    for name in sys.argv[1:] or LOOPS:
        case = LOOPS[name]
        loop, data = case.build(), case.data()
        spread = run(replicate(loop, NUM_SEEDS, mesh=mesh), put_everywhere(data, mesh))
        leaf = jax.tree.leaves(spread[0])[0]
        assert len(leaf.sharding.device_set) == NUM_DEVICES
        assert leaf.addressable_shards[0].data.shape[0] == NUM_SEEDS // NUM_DEVICES
        same(name, share_by_share(loop, data), spread)
        same(name, run(replicate(loop, NUM_SEEDS), data), spread, rtol=1e-10)
        print(name, flush=True)


if __name__ == "__main__":
    main()
