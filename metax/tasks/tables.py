"""Tables of numbers with one target a row, and what their two problems share.

`metax.tasks.regression` and `metax.tasks.classification` draw a table, cut it into the
five parts of a `FiveWay`, and put a penalty on the weights beside the loss.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.arguments import refuse
from metax.tasks.data import FiveWay

__all__ = [
    "Reward",
    "Sharing",
    "Split",
    "check_settings",
    "check_sizes",
    "cut",
    "join_splits",
    "l1_penalty",
    "shared_rule",
]

Reward = Literal["best", "last"]
Sharing = Literal["variable", "action"]


class Split(NamedTuple):
    """Rows with their targets, and how much of those no model can know.

    Attributes:
      inputs: float32 [n, d].
      targets: [n], float32 numbers or int32 classes.
      noise: float32 [], the mean of η² over these very rows, where target = f(x) + η;
        0 where there is no such thing.
    """

    inputs: Any
    targets: Any
    noise: Any


def cut(inputs: Any, targets: Any, squares: Any, sizes: tuple[int, ...]) -> FiveWay:
    """Cuts a table into five, in the order of its rows.

    Args:
      inputs: [sum(sizes), d].
      targets: [sum(sizes)].
      squares: [sum(sizes)], η² of each row.
      sizes: rows of each part, in the order of the fields of `FiveWay`.

    Returns:
      A `Split` a part; each noise is the mean of its squares, float32.
    """

    def part(end: int, size: int) -> Split:
        rows = slice(end - size, end)
        noise = squares[rows].mean().astype(np.float32)
        return Split(inputs=inputs[rows], targets=targets[rows], noise=noise)

    return FiveWay(*map(part, np.cumsum(sizes).tolist(), sizes))


def join_splits(*splits: Split) -> Split:
    """One split of several, for a model that needs no validation.

    Args:
      splits: at least one.

    Returns:
      Their rows one after the other; the noise is that of all of them.
    """
    if len({jnp.shape(split.inputs)[1:] for split in splits}) != 1:
        got = [jnp.shape(split.inputs) for split in splits]
        rule = "must be one at least, all with the same columns"
        refuse("join_splits", "splits", rule, f"inputs of shapes {got}")
    sizes = np.array([len(split.targets) for split in splits], np.float32)
    noise = sum(size * split.noise for size, split in zip(sizes, splits, strict=True))
    return Split(
        inputs=jnp.concatenate([split.inputs for split in splits]),
        targets=jnp.concatenate([split.targets for split in splits]),
        noise=noise / sizes.sum(),
    )


def l1_penalty(lam: Any) -> Callable[[Any, Any, Any], jax.Array]:
    """The loss λ Σ|θ| over all leaves; its gradient is λ times the sign, 0 at 0.

    Args:
      lam: λ; may be traced.

    Returns:
      `loss(params, batch, key) -> scalar`, of the dtype of the parameters.
    """

    def magnitude(leaf: jax.Array) -> jax.Array:
        # the derivative of jnp.abs is 1 at 0; what is no number stays none
        size = jnp.where(leaf < 0, -leaf, leaf)
        return jnp.sum(jnp.where(leaf == 0, 0, size))

    def loss(params: Any, batch: Any, key: Any) -> jax.Array:
        norm = jnp.asarray(optax.tree.sum(jax.tree.map(magnitude, params)))
        return (lam * norm).astype(norm.dtype)

    return loss


def shared_rule(rule: optax.GradientTransformation, sharing: Sharing) -> Any:
    """`rule` as `AlternatingProblem.optimizers` wants it, for two actions."""
    return rule if sharing == "variable" else {0: rule, 1: rule}


def check_sizes(function: str, sizes: tuple[int, ...]) -> None:
    """Refuses sizes that are not those of five parts.

    Raises:
      ValueError: there are not five, or one is below 1; `function` is named.
    """
    if not isinstance(sizes, tuple | list) or len(sizes) != 5 or min(sizes) < 1:
        raise ValueError(
            f"`{function}(sizes=...)` must be the rows of five parts, each at least "
            f"1; got {sizes}."
        )


def check_settings(
    function: str,
    *,
    reward: str,
    optimizer_sharing: str,
    at_least_one: dict[str, int],
    at_least_zero: dict[str, Any],
) -> None:
    """Refuses settings of a problem that mean nothing.

    Args:
      function: how the sentences name the factory.
      reward: "best" or "last".
      optimizer_sharing: "variable" or "action".
      at_least_one: counts.
      at_least_zero: numbers that may not be negative; only Python's own are looked at.

    Raises:
      ValueError: one of them is something else.
    """
    choices = {
        "reward": (reward, Reward),
        "optimizer_sharing": (optimizer_sharing, Sharing),
    }
    for argument, (value, choice) in choices.items():
        names = get_args(choice)
        if value not in names:
            raise ValueError(
                f"`{function}({argument}=...)` must be {names[0]!r} or {names[1]!r}; "
                f"got {value!r}."
            )
    for least, values in enumerate((at_least_zero, at_least_one)):
        for argument, value in values.items():
            if isinstance(value, int | float) and not value >= least:
                raise ValueError(
                    f"`{function}({argument}=...)` must be at least {least}; "
                    f"got {value}."
                )
