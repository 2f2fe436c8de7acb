"""Problems: values that say what is to be solved, and with which functions.

A problem is a tuple of pure functions and plain numbers. Nothing here knows how it will
be solved; what a method needs beyond these words it keeps to itself.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_axes, refuse

__all__ = [
    "Action",
    "AlternatingProblem",
    "BilevelProblem",
    "Hyperparameter",
    "Task",
    "last_reward",
    "squared_norm",
]

Params = Any
Batch = Any
Data = Any
Outputs = Any
Hparams = dict[str, jax.Array]
Groups = dict[str, Any]
Select = Callable[[tuple[Any, ...], Any], bool]
Optimizer = optax.GradientTransformation


class Task(NamedTuple):
    """What an inner loop solves: four pure functions, and one that most tasks lack.

    Attributes:
      init: `init(key) -> params`, a pytree of arrays.
      loss: `loss(params, batch, key) -> scalar`, the objective whose gradient is
        followed. `key` feeds whatever is random inside (dropout); most losses ignore
        it.
      sample: `sample(data, key) -> batch`, draws a batch inside jit. A set that does
        not fit in memory streams: the caller passes each host batch as `data` and
        `sample` returns it unchanged.
      evaluate: `evaluate(params, data) -> dict of scalars`, deterministic.
      carry: None, or `carry(updated, params, batch, key) -> params`: writes into
        `updated` what the forward pass of `loss(params, batch, key)` produced that is
        no weight, batch-norm statistics for example. `loss` must stop the gradient of
        such leaves; whatever the rule did to them is overwritten, but a rule that sums
        over leaves should be masked to the others. Under jit XLA shares the forward
        pass with that of the loss where it recognises the two as one.
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch, jax.Array], jax.Array]
    sample: Callable[[Data, jax.Array], Batch]
    evaluate: Callable[[Params, Data], Mapping[str, jax.Array]]
    carry: Callable[[Params, Params, Batch, jax.Array], Params] | None = None


class Hyperparameter(NamedTuple):
    """What a hyperparameter may be, in natural units: a dropout rate as a rate.

    A value, not a function: bounds travel with the problem, and the method that moves
    the hyperparameter maps them to coordinates of its own.

    Attributes:
      init: where tuning starts, within the bounds; a scalar, or an array of shape
        (k, ...): one name with k coordinates.
      lower: the least value, -inf for none.
      upper: the greatest value, inf for none.
      scale: the coordinate in which it is moved: "linear"; "log", for values that range
        over decades (lower ≥ 0); "logit", between two finite bounds; "softplus", above
        a finite lower bound.
      perturbation: the standard deviation σ of the noise that probes it, in that
        coordinate; above 0.
      shared: the whole batch gets one perturbation, and the functions of the problem
        get the value without a batch axis. For what acts on weights (dropconnect).
      discrete: rounded down after everything else (a count).
    """

    init: Any
    lower: float = -math.inf
    upper: float = math.inf
    scale: Literal["linear", "log", "logit", "softplus"] = "linear"
    perturbation: float = 1.0
    shared: bool = False
    discrete: bool = False


class BilevelProblem(NamedTuple):
    """Weights that minimise a training loss, hyperparameters a validation loss.

        λ* = argmin_λ L_V(λ, w*(λ)),    w*(λ) = argmin_w L_T(λ, w)

    The functions see *natural* hyperparameter values, `hparams`: for each name an array
    of shape (batch,) + init.shape, a value per example, or init.shape where the
    hyperparameter is `shared`. The leading axis of each leaf of a batch is the example.

    Attributes:
      init: `init(key) -> params`, a pytree of arrays.
      predict: `predict(params, batch, hparams, key) -> outputs`, any pytree of arrays
        with all that the losses need. `key` feeds what is random; None means evaluation
        and turns off dropout, augmentation and noise.
      train_loss: `train_loss(outputs, batch, hparams, params) -> (batch,)`, one loss
        per example; the mean is minimised. For weight decay call
        `squared_norm(params)`: `params` may stand for weights that differ between
        examples, and then nothing else can be done with them.
      valid_loss: `valid_loss(outputs, batch) -> scalar`, what the hyperparameters
        minimise.
      sample_train: `sample_train(data, key) -> batch`, inside jit.
      sample_valid: `sample_valid(data, key) -> batch`, inside jit.
      hparams: the `Hyperparameter` of each name.
      carry: None, or `carry(params, outputs) -> params`: writes back what a forward
        pass produced that is no weight (running statistics, recurrent state).
        `predict` must stop the gradient of the leaves it carries.
    """

    init: Callable[[jax.Array], Params]
    predict: Callable[[Params, Batch, Hparams, jax.Array | None], Outputs]
    train_loss: Callable[[Outputs, Batch, Hparams, Params], jax.Array]
    valid_loss: Callable[[Outputs, Batch], jax.Array]
    sample_train: Callable[[Data, jax.Array], Batch]
    sample_valid: Callable[[Data, jax.Array], Batch]
    hparams: Mapping[str, Hyperparameter]
    carry: Callable[[Params, Outputs], Params] | None = None


class Action(NamedTuple):
    """One choice of an alternating problem: which loss to step on, and what it moves.

    Attributes:
      loss: index into `AlternatingProblem.losses`.
      params: the parameter groups that move: a name, several names (an encoder and one
        decoder), or None for every group.
      repeats: optimizer steps taken by one decision, each on a fresh batch; at least 1.
    """

    loss: int
    params: str | tuple[str, ...] | None = None
    repeats: int = 1


def last_reward(history: jax.Array, live: jax.Array) -> jax.Array:
    """The last metric that was measured, as it is: for metrics to be maximised.

    Args:
      history: [K], the metric at each check.
      live: bool [K], which checks were reached; those come first.

    Returns:
      A scalar; NaN where no check was reached.

    Raises:
      ValueError: the shapes differ, or are not [K].
    """
    check_axes("last_reward", "history", history, "checks")
    if jnp.shape(live) != jnp.shape(history):
        rule = f"must have the shape of history, {jnp.shape(history)}"
        refuse("last_reward", "live", rule, f"shape {jnp.shape(live)}")
    last = jnp.max(jnp.where(live, jnp.arange(live.size), -1), initial=-1)
    padded = jnp.append(history, jnp.full((1,), jnp.nan, history.dtype))
    return padded[last]


class AlternatingProblem(NamedTuple):
    """Several losses on named parameter groups, stepped on one at a time.

    A run takes one `Action` after the other. With a = (loss m, groups n) a step is

        θ_n ← θ_n + u,    u from the optimizer of n and ∇_{θ_n} ℓ_m

    and every other group, its optimizer's state included, stays as it is. By convention
    data is a dict with "train", "valid" and perhaps "test"; `sample` reads the first,
    `metric` the second. Every optimizer gets `step=`, int32, the optimizer steps taken
    so far over all groups, as an extra argument.

    Attributes:
      init: `init(key) -> params`, a dict of named groups, each any pytree of arrays.
      losses: each `loss(params, batch, key) -> scalar`, of all groups; or
        `(scalar, dict of scalars)` with `has_aux`.
      actions: what can be chosen.
      optimizers: one optax rule for every group, or a mapping from group to rule; with
        `optimizer_sharing="action"` from the index of an action to its rule.
      sample: `sample(data, key) -> batch`.
      metric: `metric(params, data) -> scalar`, on the validation data; deterministic.
      maximize: whether a larger metric is the better one.
      metric_decay: in [0, 1). What counts as best, patience and history use an
        exponential moving average of the metric with this decay, which begins at the
        first value; 0 is the metric itself.
      final_metric: None, or a metric taken once, at the end, of the best parameters:
        it becomes the last entry of the history that the reward sees.
      reward: `reward(history [K], live bool [K]) -> scalar`; larger is better, whatever
        the metric's direction.
      optimizer_sharing: "variable": one optimizer state a group, which every action on
        the group uses; "action": one state an action. Rules that do not see the scale
        of a gradient (Adam) undo the weight of a loss in the second form.
      validate_every: steps between two checks of the metric, at least 1.
      patience: checks without a strictly better metric after which a run ends, once
        exceeded; None for never.
      observe: None, or `observe(params, batch, data) -> dict of arrays`: what else is
        to be seen where the metric is refreshed.
      evaluate: None, or `evaluate(params, data) -> dict of scalars`: all that is worth
        a report.
      names: one for each loss, or ().
      full_batch: `sample` ignores its key: the batch never changes.
      has_aux: losses return a dict of scalars beside the loss, of one structure.
      shared: None, or `shared(params, batch, key) -> anything`: what the losses have in
        common, the trunk below several heads. Each loss is then called with it, as
        `loss(params, batch, key, common)`, and what follows several losses at once
        differentiates it once: written into each loss a trunk is one forward pass, for
        compilers see that it is the same, but a backward pass for each loss.
    """

    init: Callable[[jax.Array], Groups]
    losses: tuple[Callable[..., Any], ...]
    actions: tuple[Action, ...]
    optimizers: Optimizer | Mapping[Any, Optimizer]
    sample: Callable[[Data, jax.Array], Batch]
    metric: Callable[[Groups, Data], jax.Array]
    maximize: bool = False
    metric_decay: float = 0.0
    final_metric: Callable[[Groups, Data], jax.Array] | None = None
    reward: Callable[[jax.Array, jax.Array], jax.Array] = last_reward
    optimizer_sharing: Literal["variable", "action"] = "variable"
    validate_every: int = 10
    patience: int | None = None
    observe: Callable[[Groups, Batch, Data], dict[str, jax.Array]] | None = None
    evaluate: Callable[[Groups, Data], Mapping[str, jax.Array]] | None = None
    names: tuple[str, ...] = ()
    full_batch: bool = False
    has_aux: bool = False
    shared: Callable[[Groups, Batch, jax.Array], Any] | None = None


def squared_norm(params: Params, select: Select | None = None) -> jax.Array:
    """Sums the squares of the weights, for a penalty inside a training loss.

    Args:
      params: a parameter tree, or what a `BilevelProblem.train_loss` was given for one:
        an object with a method `squared_norm(select)` answers for itself.
      select: `select(path, leaf) -> bool`, which leaves count, e.g.
        `lambda path, leaf: leaf.ndim > 1`; all by default. Integer leaves never do.

    Returns:
      A scalar for a tree; of shape (batch,) where the weights differ between examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax import squared_norm
      >>> params = {"kernel": jnp.array([[3.0]]), "bias": jnp.array([4.0])}
      >>> kernels = lambda path, leaf: leaf.ndim > 1
      >>> float(squared_norm(params)), float(squared_norm(params, kernels))
      (25.0, 9.0)
    """
    if not (select is None or callable(select)):
        refuse("squared_norm", "select", "must be a function of path and leaf", select)
    own = getattr(params, "squared_norm", None)
    if own is not None:
        return own(select)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    squares = [
        jnp.sum(jnp.square(leaf))
        for path, leaf in leaves
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        and (select is None or select(path, leaf))
    ]
    return sum(squares, start=jnp.zeros(()))
