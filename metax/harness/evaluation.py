"""Many runs as one: replicates and grids are loops made of loops.

Each takes a `Loop` and returns a `Loop`, so they nest: `replicate(grid(...), 5)` runs a
grid of settings from five seeds in one compiled program. Given a mesh, either spreads
its axis over the devices, each of which runs the `vmap` of its share and waits for no
other. Two devices and eight give the same bits where a share is as wide; one
`vmap` over all on one device gives the same up to rounding, since a product of two
columns and one of sixteen are different code. `evaluate_in_turn` runs the same one
after another, for steps that a scan or a vmap slows down.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from metax.arguments import check_has
from metax.base import Loop, LoopLike, check_key
from metax.harness.freezing import freeze as frozen_loop
from metax.harness.parallel import (
    check_mesh,
    check_share,
    put_everywhere,
    spread,
    spread_sharding,
)
from metax.harness.training import train

__all__ = ["evaluate", "evaluate_in_turn", "grid", "replicate"]


def replicate(loop: LoopLike, num_seeds: int, *, mesh: Mesh | None = None) -> Loop:
    """Runs independent copies of `loop` side by side.

    Copy s uses `split(key, num_seeds)[s]` of the key of `init`, and of that of each
    step. Asking for more copies leaves the first ones as they were.

    Args:
      loop: what to run.
      num_seeds: the number of copies; at least 1. Memory and time grow with it.
      mesh: devices to spread the copies over, see `device_mesh`; None for one device.

    Returns:
      A `Loop` whose state and info have a leading axis of `num_seeds`.

    Raises:
      ValueError: `num_seeds` is below 1, or no multiple of the number of devices.
    """
    check_has("replicate", "loop", loop, "a `Loop`", "init", "step")
    if num_seeds < 1:
        raise ValueError(
            f"`replicate(num_seeds=...)` must be at least 1; got {num_seeds}."
        )

    check_mesh("replicate", mesh)
    check_share("replicate(num_seeds=...)", num_seeds, mesh)
    init_each = spread(loop.init, (0,), mesh)
    step_each = spread(loop.step, (0, 0, None), mesh)

    def init(key: jax.Array) -> Any:
        return init_each(jax.random.split(key, num_seeds))

    def step(state: Any, key: jax.Array, data: Any) -> tuple[Any, Any]:
        return step_each(state, jax.random.split(key, num_seeds), data)

    return Loop(init=_placed(init, mesh), step=step)


def grid(
    build: Callable[[Any], Loop], settings: Any, *, mesh: Mesh | None = None
) -> Loop:
    """Runs one loop a setting side by side, all with the same keys.

    The settings share the initial parameters and every batch (common random numbers):
    differences between them are paired, and a batch is gathered once for all.

    Args:
      build: `build(setting) -> Loop`, where the setting is a pytree of traced scalars;
        whatever it checks must not look at their values.
      settings: the same tree, its leaves with one more, leading, axis of settings.
      mesh: devices to spread the settings over; None for one device.

    Returns:
      A `Loop` whose state and info have a leading axis of settings.

    Raises:
      ValueError: the leaves have no leading axis, or differ in its length, or it is no
        multiple of the number of devices.

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
    check_mesh("grid", mesh)
    check_share("grid(settings=...)", _check_settings(settings, "grid"), mesh)

    def init_one(setting: Any, key: jax.Array) -> Any:
        return build(setting).init(key)

    def step_one(setting: Any, state: Any, key: jax.Array, data: Any) -> Any:
        return build(setting).step(state, key, data)

    init_each = spread(init_one, (0, None), mesh)
    step_each = spread(step_one, (0, 0, None, None), mesh)

    def init(key: jax.Array) -> Any:
        return init_each(settings, key)

    def step(state: Any, key: jax.Array, data: Any) -> tuple[Any, Any]:
        return step_each(settings, state, key, data)

    return Loop(init=_placed(init, mesh), step=step)


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
    mesh: Mesh | None = None,
    freeze: bool = True,
) -> tuple[Any, Any]:
    """Trains `num_seeds` replicates of `loop`, and lets each of them diverge alone.

    A replicate, or a setting of a grid in it, whose `is_finite` is false stays as it
    was before that step, and no other notices; its later infos are NaN, as with
    `metax.harness.freeze`. `first_non_finite(infos)` says when that was. To rank runs
    look at their infos: the last state of a frozen one may look sound.

    Args:
      loop: what to run; a `grid` for a sweep.
      data: handed to every step.
      key: one typed key for all seeds.
      num_steps: steps of each replicate; at least 1.
      num_seeds: the number of replicates; at least 1.
      chunk: as in `train`.
      on_chunk: as in `train`; it sees infos of shape [chunk, num_seeds, ...].
      progress: as in `train`; runs that freeze are named on stderr as well.
      mesh: devices to spread the replicates over, see `device_mesh`; None for one.
      freeze: false for loops that recover by themselves, as `amalgamate` does: then a
        run that is not finite is carried on. Without effect where the info has no
        field `is_finite`.

    Returns:
      The last states, with a leading axis of seeds, and the infos as numpy arrays of
      shape [num_seeds, num_steps, ...].

    Raises:
      ValueError: as in `train` and `replicate`.
    """
    check_has("evaluate", "loop", loop, "a `Loop`", "init", "step")
    check_key(key, "evaluate(key=...)")
    # jitted, a step is traced once, although it is asked for the shapes of its info
    loop = Loop(loop.init, jax.jit(loop.step))
    freeze = freeze and _says_finite(loop, key, data)
    one = frozen_loop(loop, data) if freeze else loop
    frozen: set[tuple[int, ...]] = set()

    def look(step: int, state: Any, infos: Any) -> Any:
        if freeze and progress is not None:
            _report_frozen(step, infos.is_finite, frozen, progress)
        if on_chunk is not None:
            return on_chunk(step, state.state if freeze else state, infos)

    states, infos = train(
        replicate(one, num_seeds, mesh=mesh),
        put_everywhere(data, mesh),
        key,
        num_steps,
        chunk=chunk,
        on_chunk=look,
        check_finite=False,
        progress=progress,
    )
    states = states.state if freeze else states
    return states, jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, 1), infos)


def _says_finite(loop: Loop, key: jax.Array, data: Any) -> bool:
    state = jax.eval_shape(loop.init, key)
    return hasattr(jax.eval_shape(loop.step, state, key, data)[1], "is_finite")


def _report_frozen(
    step: int, is_finite: np.ndarray, known: set[tuple[int, ...]], label: str
) -> None:
    """A line on stderr for the runs that froze in this chunk."""
    first = step - len(is_finite) + is_finite.argmin(0)
    new = [tuple(map(int, at)) for at in np.argwhere(~is_finite.all(0))]
    new = [at for at in new if at not in known]
    known.update(new)
    if new:
        runs = [f"{', '.join(map(str, at))} at step {first[at]}" for at in new[:3]]
        more = f" and {len(new) - 3} more" if len(new) > 3 else ""
        text = f"{label}: not finite, frozen: replicate {'; '.join(runs)}{more}"
        tqdm.write(text, sys.stderr)


def _placed(init: Callable[[jax.Array], Any], mesh: Mesh | None) -> Any:
    """An `init` whose shapes say where its arrays lie, for whoever restores them."""
    if mesh is None:
        return init
    return jax.jit(init, out_shardings=spread_sharding(mesh))


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
    loop, as it does the gradients of its own convolutions on a CPU (not of those of
    `metax.tasks`). Keys are those of `evaluate`, so the infos are the same up to
    rounding; no run is frozen.

    Args:
      build: as in `grid`; its steps should not scan over what is slow in a loop either.
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


def _check_settings(settings: Any, function: str) -> int:
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
    return lengths.pop()
