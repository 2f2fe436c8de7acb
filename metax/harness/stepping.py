"""An unroll that the host drives, for drivers that decide between stretches."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metax.base import LoopLike, check_key
from metax.harness.processes import all_on_host

__all__ = ["host_unroll"]


def host_unroll(loop: LoopLike) -> Callable[..., tuple[Any, Any]]:
    """A `metax.unroll` of one loop whose step is compiled once, whatever the length.

    Where a jitted `unroll` compiles anew for every number of keys, this calls a jitted
    step for each. It is meant for steps that take many milliseconds and for drivers
    that run stretches of changing length, `metax.amalgamation.curriculum` for one:
    `curriculum(loop, ..., run=host_unroll(loop))`.

    Args:
      loop: what to iterate.

    Returns:
      `run(loop, state, keys, data) -> (state, infos)`, which ignores its first
      argument; the infos are numpy arrays with a leading axis of the number of keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax import Loop
      >>> from metax.harness import host_unroll
      >>> halve = Loop(lambda key: jnp.array(8.0), lambda x, key, data: (x / 2, x))
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> state, infos = host_unroll(halve)(halve, jnp.array(8.0), keys, None)
      >>> float(state), infos.tolist()
      (1.0, [8.0, 4.0, 2.0])
    """
    if not hasattr(loop, "step"):
        raise ValueError(
            "`host_unroll(loop=...)` must be a `Loop`, with a step; got "
            f"{type(loop).__name__}."
        )
    step = jax.jit(loop.step)

    def run(_: LoopLike, state: Any, keys: jax.Array, data: Any) -> tuple[Any, Any]:
        check_key(keys, "host_unroll(...)(keys=...)", ndim=1)
        infos = []
        for key in keys:
            state, info = step(state, key, data)
            infos.append(info)
        join = lambda *leaves: np.stack(leaves)
        return state, jax.tree.map(join, *all_on_host(infos))

    return run
