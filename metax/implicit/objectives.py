"""The two objectives of a `BilevelProblem` as scalars of weights and hyperparameters.

A problem sees a value per example; here a hyperparameter is one value, spread over the
batch, so that its gradient is the sum over the batch. Weights are the float leaves of
the parameters: counters are no variables of an objective.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metax.arguments import check_has, refuse
from metax.base import Batch, BilevelProblem, Hparams, Outputs, Params

__all__ = [
    "check_hparams",
    "check_params",
    "merge",
    "partition",
    "per_example",
    "train_objective",
    "valid_objective",
]


def check_hparams(
    function: str, problem: BilevelProblem, hparams: Mapping[str, Any]
) -> Hparams:
    """The values as float arrays.

    Raises:
      ValueError: the names or shapes are not those of the problem, or one is discrete.
    """
    fields = ("predict", "train_loss", "valid_loss", "hparams")
    check_has(function, "problem", problem, "a `BilevelProblem`", *fields)
    specs = problem.hparams
    if not isinstance(hparams, Mapping):
        refuse(function, "hparams", "must be a mapping of names to values", hparams)
    if set(hparams) != set(specs) or not specs:
        raise ValueError(
            f"`{function}(hparams=...)` must have the names of `problem.hparams`, at "
            f"least one: {sorted(specs)}; got {sorted(hparams)}."
        )
    values = {}
    for name, spec in specs.items():
        if spec.discrete:
            raise ValueError(
                f"`{function}(problem=...)` must be differentiable in its "
                f"hyperparameters, but {name!r} is discrete: its gradient does not "
                "exist. Fix it inside the problem, or tune it by `metax.stn`."
            )
        value = jnp.asarray(hparams[name])
        if value.shape != jnp.shape(spec.init):
            raise ValueError(
                f"`{function}(hparams=...)` must have the shape of `init` for "
                f"{name!r}, {list(jnp.shape(spec.init))}; got {list(value.shape)}. "
                "Several values at once are a `jax.vmap`."
            )
        values[name] = value.astype(jnp.result_type(value, float))
    return values


def check_params(function: str, problem: BilevelProblem, params: Params) -> None:
    """Refuses weights that are not those of the problem, but for their dtypes.

    Raises:
      ValueError: leaves are missing, too many, or of another shape.
    """
    wanted = _shapes(jax.eval_shape(problem.init, jax.random.key(0)))
    found = _shapes(params)
    differing = [
        name
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differing:
        show = lambda shapes: {name: shapes.get(name) for name in differing[:3]}
        rule = f"must have the leaves and shapes of `problem.init`: {show(wanted)}"
        refuse(function, "params", rule, show(found))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def partition(tree: Any) -> tuple[Any, Any]:
    """The tree twice: float leaves only, and all others only, None in their places."""
    is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, tree)
    rest = jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, tree)
    return floats, rest


def merge(floats: Any, rest: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda x: x is None
    )


def per_example(problem: BilevelProblem, hparams: Hparams, batch: Batch) -> Hparams:
    """One value a name, repeated as the functions of the problem want it."""
    size = jax.tree.leaves(batch)[0].shape[0]
    return {
        name: value
        if problem.hparams[name].shared
        else jnp.broadcast_to(value, (size, *value.shape))
        for name, value in hparams.items()
    }


def train_objective(
    problem: BilevelProblem,
    outputs: Outputs,
    batch: Batch,
    hparams: Hparams,
    params: Params,
) -> jax.Array:
    """Mean of the losses of the examples, a scalar.

    Raises:
      ValueError: the problem does not return one loss per example.
    """
    spread = per_example(problem, hparams, batch)
    losses = problem.train_loss(outputs, batch, spread, params)
    size = jax.tree.leaves(batch)[0].shape[0]
    if losses.shape != (size,):
        raise ValueError(
            "`BilevelProblem(train_loss=...)` must return one loss per example, shape "
            f"[{size}]; got {list(losses.shape)}."
        )
    return jnp.mean(losses)


def valid_objective(
    problem: BilevelProblem, batch: Batch, hparams: Hparams, params: Params
) -> jax.Array:
    """Validation loss of a pass in evaluation mode, a scalar."""
    spread = per_example(problem, hparams, batch)
    return problem.valid_loss(problem.predict(params, batch, spread, None), batch)
