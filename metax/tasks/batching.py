"""Batches from data that lies on the device, drawn inside jit.

Two ways. `minibatch` draws anew each step and needs no memory between steps; a task's
`sample` calls it. `epochs` makes a loop whose step is a whole epoch, in which every
example is used exactly once, as most published training settings have it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_has
from metax.base import Loop, LoopLike, check_key

__all__ = ["EpochInfo", "epochs", "minibatch"]


class EpochInfo(NamedTuple):
    """What a person wants to see of one epoch.

    Attributes:
      steps: the infos of the inner loop, with a leading axis of num_batches, in order.
      metrics: what `evaluate` returned at the end of the epoch, `{}` without it.
      is_finite: bool scalar, whether every step was finite.
    """

    steps: Any
    metrics: Mapping[str, jax.Array]
    is_finite: jax.Array


def minibatch(data: Any, key: jax.Array, size: int) -> Any:
    """Draws `size` examples of `data`, uniformly and with replacement.

    With replacement because that costs O(size), where a draw without it shuffles all N
    indices at every step; for size ≪ √N the two seldom differ. For each example once
    an epoch use `epochs`.

    Args:
      data: any pytree of arrays that share their leading axis.
      key: a typed key.
      size: how many, at least 1.

    Returns:
      The same tree, with a leading axis of `size`.

    Raises:
      ValueError: `size` is below 1, the leading axes differ, or the key is raw.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import minibatch
      >>> data = {"x": jnp.arange(100.0), "y": 2 * jnp.arange(100.0)}
      >>> batch = minibatch(data, jax.random.key(0), 8)
      >>> batch["x"].shape, bool((batch["y"] == 2 * batch["x"]).all())
      ((8,), True)
    """
    check_key(key, "minibatch(key=...)")
    _check_size(size, "minibatch(size=...)")
    length = _length(data, "minibatch(data=...)")
    return _take(data, jax.random.randint(key, (size,), 0, length))


def epochs(
    loop: LoopLike,
    size: int,
    *,
    evaluate: Callable[[Any, Any], Mapping[str, jax.Array]] | None = None,
) -> Loop:
    """Makes one step of a loop out of an epoch of `loop`.

    With N training examples in an order drawn anew each epoch, step i of
    ⌈N / size⌉ is

        state, info_i = loop.step(state, fold_in(key_steps, i), batch_i)

    Every example is used exactly once. The last batch is smaller where `size` does not
    divide N (MNIST: 468 batches of 128, one of 96) and costs one more trace of
    `loop.step`; otherwise there is one trace. A batch is gathered by its indices when
    its turn comes, so the data are never copied whole.

    Args:
      loop: takes a batch as its data. The `sample` of its task hands the batch on, as
        that of `image_classification(..., batch_size=None)` does.
      size: examples a batch, from 1 to N.
      evaluate: `evaluate(state, test) -> dict of scalars`, run once at the end of the
        epoch, e.g. `lambda state, test: task.evaluate(state.params, test)`.

    Returns:
      A `Loop` with the state of `loop` and an `EpochInfo`. Its data is anything with a
      field `train`, a pytree of arrays with a leading axis of N, and, for `evaluate`, a
      field `test`: a `Dataset`, for one.

    Raises:
      ValueError: `size` is below 1; at the first step, it exceeds N, the leading axes
        differ, a field is missing, or the key is raw.

    Example:
      >>> import jax, optax
      >>> from metax import inner_loop, unroll
      >>> from metax.tasks import Linear, epochs, image_classification, load
      >>> data = load("digits")
      >>> task = image_classification(Linear(10), data.train.image[0], std=16.0)
      >>> loop = epochs(inner_loop(task, optax.sgd(0.1)), 128)
      >>> state = loop.init(jax.random.key(0))
      >>> keys = jax.random.split(jax.random.key(1), 2)
      >>> state, infos = unroll(loop, state, keys, data)
      >>> infos.steps.loss.shape  # ⌈1437 / 128⌉ = 12 batches an epoch
      (2, 12)
    """
    _check_size(size, "epochs(size=...)")
    check_has("epochs", "loop", loop, "a `Loop`", "init", "step")

    def step(state: Any, key: jax.Array, data: Any) -> tuple[Any, EpochInfo]:
        check_key(key, "epochs(...).step(key=...)")
        train = _field(data, "train")
        length = _length(train, "epochs(...).step(data=...).train")
        if size > length:
            raise ValueError(
                "`epochs(size=...)` must be at most the number of training examples; "
                f"got size={size}, {length} examples."
            )
        key_order, key_steps = jax.random.split(key)
        order = jax.random.permutation(key_order, length)
        num_full = length // size
        rows_full, rows_rest = jnp.split(order, [num_full * size])

        def batch_step(state: Any, turn: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            i, rows = turn
            return loop.step(
                state, jax.random.fold_in(key_steps, i), _take(train, rows)
            )

        turns = (jnp.arange(num_full), rows_full.reshape(num_full, size))
        state, steps = jax.lax.scan(batch_step, state, turns)
        if rows_rest.size:
            state, last = batch_step(state, (num_full, rows_rest))
            steps = jax.tree.map(_append, steps, last)
        metrics = {} if evaluate is None else evaluate(state, _field(data, "test"))
        is_finite = jnp.all(getattr(steps, "is_finite", jnp.array(True)))
        return state, EpochInfo(steps=steps, metrics=metrics, is_finite=is_finite)

    return Loop(init=loop.init, step=step)


def _take(data: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], data)


def _append(stacked: jax.Array, last: jax.Array) -> jax.Array:
    return jnp.concatenate([stacked, last[None]])


def _field(data: Any, name: str) -> Any:
    try:
        return getattr(data, name)
    except AttributeError:
        raise ValueError(
            f"`epochs(...).step(data=...)` must have a field `{name}`, as "
            f"`metax.tasks.Dataset` has; got {type(data).__name__}."
        ) from None


def _check_size(size: int, argument: str) -> None:
    if size < 1:
        raise ValueError(f"`{argument}` must be at least 1; got {size}.")


def _length(data: Any, argument: str) -> int:
    """The leading axis that all leaves share."""
    shapes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(shapes) != 1 or shapes & {(), (0,)}:
        raise ValueError(
            f"`{argument}` must hold arrays that share a leading axis of at least 1; "
            f"got leading axes {sorted(shapes)}."
        )
    return shapes.pop()[0]
