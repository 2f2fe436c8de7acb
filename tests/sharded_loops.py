"""Run as a program: replicates of every Loop, spread over eight virtual devices."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from metax import Loop
from metax.harness import replicate
from tests.loops import LOOPS

NUM_SEEDS = 8


def run(loop: Loop, data, place):
    """Three steps of eight replicates, whose states and keys `place` puts somewhere."""
    several = replicate(loop, NUM_SEEDS)
    state = place(jax.jit(several.init)(jax.random.key(0)))
    step = jax.jit(several.step)
    for key in jax.random.split(jax.random.key(1), 3):
        state, info = step(state, key, data)
    return state, info


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((8,), ("seed",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("seed"))
    for name, case in LOOPS.items():
        loop, data = case.build(), case.data()
        whole = run(loop, data, lambda state: state)
        sharded = run(loop, data, lambda state: jax.device_put(state, spread))
        assert len(jax.tree.leaves(sharded[0])[0].sharding.device_set) == 8
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
            # One replicate a device compiles to other contractions than eight on one:
            # the last bit may differ.
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-12)
        print(name)


if __name__ == "__main__":
    main()
