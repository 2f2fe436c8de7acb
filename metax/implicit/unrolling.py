"""Hypergradients by differentiating through steps of the training run itself."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from metax.arguments import check_rule
from metax.base import BilevelProblem, Data, Hparams, InnerState, Params, check_key
from metax.implicit.objectives import (
    check_hparams,
    check_params,
    merge,
    partition,
    per_example,
    train_objective,
    valid_objective,
)

__all__ = ["unrolled_hypergradient"]


def unrolled_hypergradient(
    problem: BilevelProblem,
    params: Params,
    hparams: Mapping[str, Any],
    data: Data,
    key: jax.Array,
    *,
    inner_optimizer: optax.GradientTransformation,
    steps: int,
    truncation: int | None = None,
    remat: bool = False,
) -> tuple[Hparams, Params]:
    """The derivative of the validation loss after `steps` steps of training.

        w_{t+1} = rule(w_t, ∂_w L_T(λ, w_t, batch_t)),      dL_V(λ, w_steps)/dλ

    Exact for the run as it is, optimum or not; blind to what training beyond `steps`
    would do, so a few steps favour short-sighted hyperparameters. Cost: about three
    times the training of these steps, and memory of every step's intermediates
    (`remat`: of every step's weights and one step's intermediates).

    L_T must be differentiable in λ: for a dropout rate or the strength of an
    augmentation, which enter only by sampling, **the result is wrong by construction**;
    use `metax.stn` there. So must the rule be in the gradient: `optax.adam`, `nadam`
    and `lamb` with `eps_root=0` divide by √v, and where a coordinate's gradient is
    exactly zero the result is NaN; give them an `eps_root` above 0.

    Args:
      problem: what is tuned.
      params: where training starts. Only float leaves are trained; integer leaves
        change by `problem.carry` alone.
      hparams: the natural value of each name, of the shape of its `init`, held over the
        run.
      data: handed to `sample_train` at each step and to `sample_valid` at the end.
      key: draws the batches and whatever is random in training.
      inner_optimizer: the rule of the inner loop, started afresh.
      steps: how many, at least 1.
      truncation: None, or k in 1..steps: differentiate the last k steps only. The steps
        before need no memory. From an optimum under gradient descent k steps give the
        first k terms of the Neumann series of `implicit_hypergradient`.
      remat: recompute each step in the backward pass, as `metax.unroll` does.

    Returns:
      dL_V/dx of each natural value x, of its shape, and the last parameters.

    Raises:
      ValueError: names or shapes of `hparams` or `params` are not the problem's, a
        hyperparameter is discrete, `steps` or `truncation` is out of range, or the key
        is raw.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from metax import BilevelProblem, Hyperparameter
      >>> from metax.implicit import unrolled_hypergradient
      >>> problem = BilevelProblem(  # w* = 3 / (1 + d); L_V = w*² / 2
      ...     init=lambda key: jnp.zeros(()),
      ...     predict=lambda w, batch, hparams, key: w * jnp.ones_like(batch),
      ...     train_loss=lambda out, batch, hparams, w: (
      ...         0.5 * (out - batch) ** 2 + 0.5 * hparams["decay"] * w**2
      ...     ),
      ...     valid_loss=lambda out, batch: 0.5 * jnp.mean((out - batch) ** 2),
      ...     sample_train=lambda data, key: data[0],
      ...     sample_valid=lambda data, key: data[1],
      ...     hparams={"decay": Hyperparameter(0.5, lower=0.0, scale="log")},
      ... )
      >>> data = jnp.array([3.0]), jnp.array([0.0])
      >>> gradient, w = unrolled_hypergradient(
      ...     problem, jnp.array(0.0), {"decay": 0.5}, data, jax.random.key(0),
      ...     inner_optimizer=optax.sgd(0.4), steps=50,
      ... )
      >>> print(round(float(gradient["decay"]), 4), round(float(w), 4))
      -2.6667 2.0

    References:
      Maclaurin, Duvenaud & Adams, "Gradient-based hyperparameter optimization through
      reversible learning", ICML 2015, arXiv 1502.03492 (here without the reversal).
      Shaban et al., "Truncated back-propagation for bilevel optimization", AISTATS
      2019, arXiv 1810.10667 (`truncation`).
    """
    check_key(key, "unrolled_hypergradient(key=...)")
    values = check_hparams("unrolled_hypergradient", problem, hparams)
    check_params("unrolled_hypergradient", problem, params)
    check_rule("unrolled_hypergradient", "inner_optimizer", inner_optimizer)
    kept = _check_steps(steps, truncation)
    key_train, key_valid = jax.random.split(key)
    keys = jax.random.split(key_train, steps)
    rule = optax.with_extra_args_support(inner_optimizer)
    start = InnerState(params=params, opt_state=rule.init(partition(params)[0]))
    # what is not differentiated is simply run before
    before = _train(problem, rule, values, start, keys[:-kept], data)

    def outcome(hparams: Hparams) -> tuple[jax.Array, Params]:
        kept_keys = keys[-kept:]
        last = _train(problem, rule, hparams, before, kept_keys, data, remat=remat)
        batch = problem.sample_valid(data, key_valid)
        return valid_objective(problem, batch, hparams, last.params), last.params

    return jax.grad(outcome, has_aux=True)(values)


def _train(
    problem: BilevelProblem,
    rule: optax.GradientTransformationExtraArgs,
    hparams: Hparams,
    state: InnerState,
    keys: jax.Array,
    data: Data,
    *,
    remat: bool = False,
) -> InnerState:
    """One step per key at given hyperparameters, of the float leaves alone."""

    def step(state: InnerState, key: jax.Array) -> tuple[InnerState, None]:
        key_sample, key_predict = jax.random.split(key)
        batch = problem.sample_train(data, key_sample)
        spread = per_example(problem, hparams, batch)
        floats, rest = partition(state.params)

        def objective(floats: Any) -> tuple[jax.Array, Any]:
            params = merge(floats, rest)
            outputs = problem.predict(params, batch, spread, key_predict)
            return train_objective(problem, outputs, batch, hparams, params), outputs

        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        (loss, outputs), grad = value_and_grad(floats)
        value_fn = lambda floats: objective(floats)[0]
        extra = {"value": loss, "grad": grad, "value_fn": value_fn}
        updates, opt_state = rule.update(grad, state.opt_state, floats, **extra)
        params = merge(optax.apply_updates(floats, updates), rest)
        if problem.carry is not None:
            params = problem.carry(params, outputs)
        return InnerState(params=params, opt_state=opt_state), None

    last, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, state, keys)
    return last


def _check_steps(steps: int, truncation: int | None) -> int:
    """How many steps are differentiated."""
    if steps < 1:
        raise ValueError(
            f"`unrolled_hypergradient(steps=...)` must be at least 1; got {steps}."
        )
    if truncation is not None and not 1 <= truncation <= steps:
        raise ValueError(
            "`unrolled_hypergradient(truncation=...)` must be None or from 1 to "
            f"`steps`; got truncation={truncation}, steps={steps}."
        )
    return steps if truncation is None else truncation
