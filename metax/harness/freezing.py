"""A run that ceases to be finite stays where it was, while its neighbours go on.

Under `vmap` nothing can stop alone: a step is made for all runs. So each run carries a
flag, and from the first step that is not finite its state is no longer replaced. Other
runs do not notice, and what there was before the trouble can still be looked at.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metax.arguments import check_has
from metax.base import Loop, LoopLike

__all__ = ["FreezeState", "first_non_finite", "freeze"]


class FreezeState(NamedTuple):
    """What a loop carries whose runs may freeze.

    Attributes:
      state: that of the loop; of a frozen run as it was before the step that failed.
      is_finite: bool, false from the step that failed; a scalar for one run, else with
        the leading axes of the runs.
    """

    state: Any
    is_finite: jax.Array


def freeze(loop: LoopLike, data: Any) -> Loop:
    """Keeps each run of `loop` as it was before its first step that is not finite.

        s', info  = loop.step(s, key, data)
        f'        = f and all(info.is_finite)
        s'        = s' where f', else s;      info's numbers = NaN where not f

    The runs are told apart by the leading axes that `is_finite` shares with every leaf
    of the state: those of `replicate` and `grid`. Flags inside a run, as of the
    rollouts of `autoloss`, count together. A loop that recovers by itself, as
    `amalgamate` does, had better not be frozen. Costs a second state in memory.

    Args:
      loop: what to run; its info has a field `is_finite`.
      data: what the steps will be handed; only its shapes are looked at.

    Returns:
      A `Loop` with a `FreezeState`. The info of the step that failed is as it was; in
      later ones `is_finite` is false, and floating numbers are NaN.

    Raises:
      ValueError: the info has no field `is_finite`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from metax import Task, inner_loop
      >>> from metax.harness import freeze, train
      >>> task = Task(
      ...     init=lambda key: jnp.array(4.0),
      ...     loss=lambda x, batch, key: jnp.log(x),
      ...     sample=lambda data, key: data,
      ...     evaluate=lambda x, data: {},
      ... )
      >>> loop = freeze(inner_loop(task, optax.sgd(8.0)), None)
      >>> state, infos = train(loop, None, jax.random.key(0), 4, check_finite=False)
      >>> float(state.state.params), infos.is_finite.tolist()
      (-2.0, [True, True, False, False])
    """
    check_has("freeze", "loop", loop, "a `Loop`", "init", "step")
    step_once = jax.jit(loop.step)  # traced once, for its shapes and for its steps

    def init(key: jax.Array) -> FreezeState:
        state = loop.init(key)
        _, info = jax.eval_shape(step_once, state, key, data)
        if not hasattr(info, "is_finite"):
            raise ValueError(
                "`freeze(loop=...)` must have a field is_finite in its info; got "
                f"{type(info).__name__}."
            )
        return FreezeState(state, jnp.ones(_runs(state, info.is_finite), bool))

    def step(frozen: FreezeState, key: jax.Array, data: Any) -> tuple[Any, Any]:
        state, info = step_once(frozen.state, key, data)
        going = frozen.is_finite
        inside = tuple(range(going.ndim, info.is_finite.ndim))
        fine = going & info.is_finite.all(inside)
        kept = jax.tree.map(
            lambda new, old: jnp.where(_beside(fine, new), new, old),
            state,
            frozen.state,
        )
        return FreezeState(kept, fine), _without_later(info, going, fine)

    return Loop(init, step)


def first_non_finite(infos: Any) -> np.ndarray:
    """Finds when each run ceased to be finite.

    Args:
      infos: those of `evaluate`, with a field `is_finite` [num_seeds, num_steps, ...].

    Returns:
      int64 [num_seeds, ...], the step, counted from 0; -1 where all were finite.

    Example:
      >>> import numpy as np
      >>> from typing import NamedTuple
      >>> from metax.harness import first_non_finite
      >>> class Info(NamedTuple):
      ...     is_finite: np.ndarray
      >>> first_non_finite(Info(np.array([[True, True], [True, False]]))).tolist()
      [-1, 1]
    """
    what = "infos of `evaluate`"
    check_has("first_non_finite", "infos", infos, what, "is_finite")
    bad = ~np.asarray(infos.is_finite)
    return np.where(bad.any(1), bad.argmax(1), -1)


def _runs(state: Any, is_finite: Any) -> tuple[int, ...]:
    """The leading axes that the flags share with every leaf of the state."""
    shape = is_finite.shape
    for leaf in jax.tree.leaves(state):
        same = [a == b for a, b in zip(shape, leaf.shape, strict=False)]
        shape = shape[: (*same, False).index(False)]
    return shape


def _beside(flags: jax.Array, leaf: jax.Array) -> jax.Array:
    return flags.reshape(flags.shape + (1,) * (leaf.ndim - flags.ndim))


def _without_later(info: Any, going: jax.Array, fine: jax.Array) -> Any:
    """The info of a step; nothing is claimed of one that a frozen run did not make."""

    def see(path: Any, leaf: jax.Array) -> jax.Array:
        if leaf.shape[: going.ndim] != going.shape:
            return leaf
        if jax.tree_util.keystr(path) == ".is_finite":
            return leaf & _beside(fine, leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.where(_beside(going, leaf), leaf, jnp.nan)
        return leaf

    return jax.tree_util.tree_map_with_path(see, info)
