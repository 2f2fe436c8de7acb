"""Many runs as one: replicates and grids are loops made of loops.

Each takes a `Loop` and returns a `Loop`, so they nest: `replicate(grid(...), 5)` runs a
grid of settings from five seeds in one compiled program. `evaluate_in_turn` runs the
same one after another, for steps that a scan or a vmap slows down.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from metax.base import Loop, LoopLike, check_key
from metax.harness.training import train

__all__ = ["evaluate", "evaluate_in_turn", "grid", "replicate"]


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
    _check_settings(settings, "grid")

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


def evaluate_in_turn(
    build: Callable[[Any], LoopLike],
    settings: Any,
    data: Any,
    key: jax.Array,
    num_steps: int,
    *,
    num_seeds: int,
    judge: Callable[[Any, Any], Any],
    judge_every: int,
    on_judged: Callable[[int, Any], Any] | None = None,
    progress: str | None = None,
) -> tuple[Any, Any]:
    """Runs what `evaluate(grid(build, settings), ...)` does, one run after another.

    A step is a jitted function that the host calls, neither scanned nor vmapped, and
    compiled once for all runs. For steps of many milliseconds that XLA slows down in a
    loop, as it does the gradients of convolutions on a CPU. Keys are those of
    `evaluate`, so the infos are the same up to rounding.

    Args:
      build: as in `grid`; its steps should not scan over convolutions either.
      settings: as in `grid`.
      data: handed to every step and to `judge`.
      key: one typed key for all runs.
      num_steps: steps of each run; at least 1.
      num_seeds: runs of each setting; at least 1.
      judge: `judge(state, data)`, a pytree of arrays, jitted.
      judge_every: steps between judgements; divides `num_steps`.
      on_judged: called as `on_judged(infos, judged)` after each judgement, with the
        infos of the steps before it, as numpy arrays.
      progress: the label of a bar over runs on stderr; None for no bar.

    Returns:
      The infos as numpy arrays of shape [num_seeds, num_steps, settings, ...], and the
      judgements, of [num_seeds, num_steps // judge_every, settings, ...].

    Raises:
      ValueError: an argument breaks one of the rules above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax import Loop
      >>> from metax.harness import evaluate_in_turn
      >>> def build(rate):
      ...     return Loop(lambda key: jnp.array(1.0), lambda x, k, d: (x * rate, x))
      >>> infos, judged = evaluate_in_turn(
      ...     build, jnp.array([0.5, 2.0]), None, jax.random.key(0), 4, num_seeds=1,
      ...     judge=lambda state, data: 10 * state, judge_every=2
      ... )
      >>> infos.shape, judged[0].tolist()
      ((1, 4, 2), [[2.5, 40.0], [0.625, 160.0]])
    """
    check_key(key, "evaluate_in_turn(key=...)")
    settings = jax.tree.map(jnp.asarray, settings)
    _check_settings(settings, "evaluate_in_turn")
    _check_turns(num_steps, num_seeds, judge_every)
    init = jax.jit(lambda setting, key: build(setting).init(key))
    step = jax.jit(
        lambda setting, state, key, data: build(setting).step(state, key, data),
        donate_argnums=1,
    )
    judged, data = jax.jit(judge), jax.device_put(data)
    key_init, key_run = jax.random.split(key)
    shares = lambda key: jax.random.split(key, num_seeds)
    own = jax.vmap(lambda i: shares(jax.random.fold_in(key_run, i)))
    keys_init, keys = shares(key_init), own(jnp.arange(num_steps))
    size, done = len(jax.tree.leaves(settings)[0]), []
    runs = list(itertools.product(range(num_seeds), range(size)))
    for seed, at in tqdm(runs, progress, file=sys.stderr, disable=progress is None):
        setting = jax.tree.map(lambda x, at=at: x[at], settings)
        state, run = init(setting, keys_init[seed]), []
        for first in range(0, num_steps, judge_every):
            infos = []
            for i in range(first, first + judge_every):
                state, info = step(setting, state, keys[i, seed], data)
                infos.append(info)
            run.append((_stack(infos), jax.device_get(judged(state, data))))
            if on_judged is not None:
                on_judged(*run[-1])
        infos, judgements = zip(*run, strict=True)
        done.append((_join(infos), _stack(judgements)))
    by_run = lambda x: np.moveaxis(x.reshape(num_seeds, size, *x.shape[1:]), 1, 2)
    return jax.tree.map(by_run, _stack(done))


def _stack(trees: Sequence[Any]) -> Any:
    """Numpy arrays with a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(trees))


def _join(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


def _check_turns(num_steps: int, num_seeds: int, judge_every: int) -> None:
    given = {"num_steps": num_steps, "num_seeds": num_seeds, "judge_every": judge_every}
    for name, value in given.items():
        if value < 1:
            raise ValueError(
                f"`evaluate_in_turn({name}=...)` must be at least 1; got {value}."
            )
    if num_steps % judge_every:
        raise ValueError(
            "`evaluate_in_turn(judge_every=...)` must divide num_steps; got "
            f"judge_every={judge_every}, num_steps={num_steps}."
        )


def _check_settings(settings: Any, function: str) -> None:
    shapes = {
        jax.tree_util.keystr(path) or "settings": list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(settings)
    }
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"`{function}(settings=...)` must be a tree of arrays with one leading "
            f"axis of the same length, at least 1; got {shapes}."
        )
