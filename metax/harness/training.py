"""The host side of an unroll: chunks of one jitted scan, watched between chunks.

A run is a function of `(loop, data, key)`: the key is split into one for `loop.init`
and one for the steps, and step i uses `fold_in(key_run, i)`. Hence `(i, state)` is all
that a checkpoint needs, and neither the size of the chunks nor a stop in between
changes a bit of the result.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from metax.arguments import check_has
from metax.base import LoopLike, check_key, unroll
from metax.harness.processes import all_on_host

__all__ = ["NonFiniteError", "train"]

OnChunk = Callable[[int, Any, Any], Any]


class NonFiniteError(FloatingPointError):
    """A step said that it was not finite, and the run was stopped.

    Attributes:
      step: the first step, counted from 0, whose `is_finite` was not true.
      leaf: the path of a non-finite leaf of the state at the end of that step's chunk
        (NaN before infinity), None where the state was still finite.
      checkpoint: what `on_chunk` last returned, None where it returned nothing.
      infos: the paths of what was not finite in that step's info.
    """

    def __init__(
        self,
        step: int,
        leaf: str | None,
        checkpoint: Any | None,
        infos: tuple[str, ...] = (),
    ):
        self.step = step
        self.leaf = leaf
        self.checkpoint = checkpoint
        self.infos = infos
        # all of them: an exception crosses processes by its args
        super().__init__(step, leaf, checkpoint, infos)

    def __str__(self) -> str:
        leaf, infos, checkpoint = self.leaf, self.infos, self.checkpoint
        where = "the state is finite" if leaf is None else f"state{leaf} is not either"
        seen = f", by its info {', '.join(infos)}" if infos else ""
        remedy = "None" if checkpoint is None else f"{checkpoint}, to go on from"
        return (
            f"step {self.step} is not finite{seen} (at the end of its chunk {where}); "
            f"last good checkpoint: {remedy}."
        )


def train(
    loop: LoopLike,
    data: Any,
    key: jax.Array,
    num_steps: int,
    *,
    chunk: int | None = None,
    state: Any | None = None,
    start: int = 0,
    on_chunk: OnChunk | None = None,
    check_finite: bool = True,
    progress: str | None = None,
) -> tuple[Any, Any]:
    """Runs steps `start` to `num_steps` of `loop`, one jitted scan a chunk.

    With `key_init, key_run = split(key)` the run is

        state_0             = loop.init(key_init)
        state_{i+1}, info_i = loop.step(state_i, fold_in(key_run, i), data)

    so `train(..., state=state_k, start=k)` with the same key repeats what an
    uninterrupted run does after k steps, bit for bit. The step is compiled once; the
    state is donated from chunk to chunk, so it lies in memory once.

    Args:
      loop: what to run.
      data: handed to every step; any pytree of arrays.
      key: one typed key for the whole run.
      num_steps: where to stop, counted from step 0; at least 1.
      chunk: steps between two looks of the host; must divide `num_steps - start`. By
        default the divisor nearest, as a ratio, to a twentieth of these steps (at most
        1000).
      state: where to go on from; needed where `start > 0`. It is copied, so the
        caller's arrays survive.
      start: how many steps `state` has behind it.
      on_chunk: called as `on_chunk(step, state, infos)` after each chunk, with the
        number of steps done and the infos of the chunk as numpy arrays. The state must
        be read within the call: its memory is used again by the next chunk. What it
        returns, if anything, is taken for the place where the state was saved.
      check_finite: stop where a field `is_finite` of the infos, of any shape, is not
        true throughout.
      progress: the label of a progress bar on stderr; None for no bar.

    Returns:
      The last state, and the infos of all steps as numpy arrays with a leading axis of
      `num_steps - start`.

    Raises:
      ValueError: an argument breaks one of the rules above.
      NonFiniteError: a step was not finite; `on_chunk` has not seen its chunk.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax import Loop
      >>> from metax.harness import train
      >>> halve = Loop(lambda key: jnp.array(8.0), lambda x, key, data: (x / 2, x))
      >>> state, infos = train(halve, None, jax.random.key(0), num_steps=4, chunk=2)
      >>> float(state), infos.tolist()
      (0.5, [8.0, 4.0, 2.0, 1.0])
    """
    check_key(key, "train(key=...)")
    check_has("train", "loop", loop, "a `Loop`", "init", "step")
    chunk = _check_steps(num_steps, start, chunk, state)
    key_init, key_run = jax.random.split(key)
    done, checkpoint = [], None
    with _bar(progress, start, num_steps) as bar:
        data = jax.device_put(data)
        state = jax.jit(loop.init)(key_init) if state is None else state
        state = jax.tree.map(_own, state)
        run_chunk = jax.jit(
            functools.partial(_run_chunk, loop, chunk), donate_argnums=0
        )
        for first in range(start, num_steps, chunk):
            state, infos = run_chunk(state, key_run, first, data)
            bar.set_description(progress)
            infos = all_on_host(infos)
            if check_finite:
                _raise_non_finite(first, state, infos, checkpoint)
            done.append(infos)
            bar.update(chunk)
            if on_chunk is not None:
                saved = on_chunk(first + chunk, state, infos)
                checkpoint = checkpoint if saved is None else saved
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *done)


def _run_chunk(
    loop: LoopLike,
    chunk: int,
    state: Any,
    key_run: jax.Array,
    first: jax.Array,
    data: Any,
) -> tuple[Any, Any]:
    steps = first + jnp.arange(chunk)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key_run))(steps)
    return unroll(loop, state, keys, data)


def _bar(label: str | None, start: int, num_steps: int) -> tqdm:
    return tqdm(
        desc=f"{label} (compiling)",
        initial=start,
        total=num_steps,
        file=sys.stderr,
        disable=label is None,
    )


def _own(leaf: Any) -> jax.Array:
    """A copy that may be donated, and whose dtype is not weak: one compilation."""
    return jnp.array(leaf, dtype=jnp.asarray(leaf).dtype, copy=True)


def _raise_non_finite(first: int, state: Any, infos: Any, checkpoint: Any) -> None:
    is_finite = getattr(infos, "is_finite", None)
    if is_finite is None or np.all(is_finite):
        return
    good = np.asarray(is_finite).reshape(len(is_finite), -1).all(axis=1)
    row = int(np.argmin(good))
    bad = tuple(
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(infos)
        if np.issubdtype(leaf.dtype, np.inexact) and not np.isfinite(leaf[row]).all()
    )
    raise NonFiniteError(first + row, _non_finite_leaf(state), checkpoint, bad)


def _non_finite_leaf(state: Any) -> str | None:
    """The first leaf with a NaN, else the first with an infinity.

    NaN comes first because an infinity may be meant, as in "best loss so far".
    """
    leaves = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    for is_bad in (jnp.isnan, jnp.isinf):
        for path, leaf in leaves:
            if is_bad(leaf).any():
                return path
    return None


def _check_steps(num_steps: int, start: int, chunk: int | None, state: Any) -> int:
    if num_steps < 1:
        raise ValueError(
            f"`train(num_steps=...)` must be at least 1; got num_steps={num_steps}."
        )
    if not 0 <= start < num_steps:
        raise ValueError(
            "`train(start=...)` must lie in [0, num_steps); got "
            f"start={start}, num_steps={num_steps}."
        )
    if start > 0 and state is None:
        raise ValueError(
            f"`train(state=...)` must be given where start > 0; got start={start} and "
            "no state. `restore_checkpoint` returns both."
        )
    chunk = _default_chunk(num_steps - start) if chunk is None else chunk
    if chunk < 1 or (num_steps - start) % chunk:
        raise ValueError(
            "`train(chunk=...)` must divide num_steps - start; got "
            f"chunk={chunk}, num_steps={num_steps}, start={start}."
        )
    return chunk


def _default_chunk(num_steps: int) -> int:
    wanted = min(num_steps / 20, 1000)
    small = [d for d in range(1, math.isqrt(num_steps) + 1) if num_steps % d == 0]
    divisors = small + [num_steps // d for d in small]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))
