"""Many runs as one: replicates and grids are loops made of loops.

Each takes a `Loop` and returns a `Loop`, so they nest: `replicate(grid(...), 5)` runs a
grid of settings from five seeds in one compiled program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metax.base import Loop, LoopLike
from metax.harness.training import train

__all__ = ["evaluate", "grid", "replicate"]


def replicate(loop: LoopLike, num_seeds: int) -> Loop:
    """Runs independent copies of `loop` side by side.

    Copy s uses `split(key, num_seeds)[s]` of the key of `init`, and of that of each
    step. Asking for more copies leaves the first ones as they were.

    Args:
      loop: what to run.
      num_seeds: the number of copies; at least 1. Memory and time grow with it.

    Returns:
      A `Loop` whose state and info have a leading axis of `num_seeds`.

    Raises:
      ValueError: `num_seeds` is below 1.
    """
    if num_seeds < 1:
        raise ValueError(
            f"`replicate(num_seeds=...)` must be at least 1; got {num_seeds}."
        )

    def init(key: jax.Array) -> Any:
        return jax.vmap(loop.init)(jax.random.split(key, num_seeds))

    def step(state: Any, key: jax.Array, data: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key, num_seeds)
        return jax.vmap(loop.step, (0, 0, None))(state, keys, data)

    return Loop(init=init, step=step)


def grid(build: Callable[[Any], Loop], settings: Any) -> Loop:
    """Runs one loop a setting side by side, all with the same keys.

    The settings share the initial parameters and every batch (common random numbers):
    differences between them are paired, and a batch is gathered once for all.

    Args:
      build: `build(setting) -> Loop`, where the setting is a pytree of traced scalars;
        whatever it checks must not look at their values.
      settings: the same tree, its leaves with one more, leading, axis of settings.

    Returns:
      A `Loop` whose state and info have a leading axis of settings.

    Raises:
      ValueError: the leaves have no leading axis, or differ in its length.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax import Loop
      >>> from metax.harness import grid, train
      >>> def build(rate):
      ...     return Loop(lambda key: jnp.array(1.0), lambda x, k, d: (x * rate, x))
      >>> loop = grid(build, jnp.array([0.5, 2.0]))
      >>> state, infos = train(loop, None, jax.random.key(0), num_steps=3)
      >>> state.tolist(), infos.shape
      ([0.125, 8.0], (3, 2))
    """
    settings = jax.tree.map(jnp.asarray, settings)
    _check_settings(settings)

    def init(key: jax.Array) -> Any:
        return jax.vmap(lambda setting: build(setting).init(key))(settings)

    def step(state: Any, key: jax.Array, data: Any) -> tuple[Any, Any]:
        def step_one(setting: Any, state: Any) -> tuple[Any, Any]:
            return build(setting).step(state, key, data)

        return jax.vmap(step_one)(settings, state)

    return Loop(init=init, step=step)


def evaluate(
    loop: LoopLike,
    data: Any,
    key: jax.Array,
    num_steps: int,
    *,
    num_seeds: int,
    chunk: int | None = None,
    on_chunk: Callable[[int, Any, Any], Any] | None = None,
    progress: str | None = None,
) -> tuple[Any, Any]:
    """Trains `num_seeds` replicates of `loop`, and lets each of them diverge alone.

    A replicate that stops being finite is carried on: its infos say so, and no other
    replicate notices.

    Args:
      loop: what to run; a `grid` for a sweep.
      data: handed to every step.
      key: one typed key for all seeds.
      num_steps: steps of each replicate; at least 1.
      num_seeds: the number of replicates; at least 1.
      chunk: as in `train`.
      on_chunk: as in `train`; it sees infos of shape [chunk, num_seeds, ...].
      progress: as in `train`.

    Returns:
      The last states, with a leading axis of seeds, and the infos as numpy arrays of
      shape [num_seeds, num_steps, ...].

    Raises:
      ValueError: as in `train` and `replicate`.
    """
    states, infos = train(
        replicate(loop, num_seeds),
        data,
        key,
        num_steps,
        chunk=chunk,
        on_chunk=on_chunk,
        check_finite=False,
        progress=progress,
    )
    return states, jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, 1), infos)


def _check_settings(settings: Any) -> None:
    shapes = {
        jax.tree_util.keystr(path) or "settings": list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(settings)
    }
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "`grid(settings=...)` must be a tree of arrays with one leading axis of "
            f"the same length, at least 1; got {shapes}."
        )
