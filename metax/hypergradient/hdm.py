"""HDM-HB: gradient descent that learns a step matrix and a momentum, full batch only.

Hypergradient descent asks after a step how the loss would have changed with the rate.
HDM asks at a *test point* before it moves: y is tried, the gradient found there teaches
the step matrix P and the momentum b whether or not y is any good, and the iterate moves
to y only where the objective is lower (otherwise it stays: a null step). A test point
that is accepted is the next iterate, so value and gradient there are paid for once.
"""

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.hypergradient.arguments import (
    check_given,
    check_hdm_arguments,
    check_real,
)
from metax.hypergradient.rates import all_finite, rate_dtype, select

__all__ = ["HDMHBState", "hdm_hb"]


class HDMHBState(NamedTuple):
    """What iteration k + 1 needs of iteration k.

    Scalars are real, in the widest dtype of the parameters and at least float32.

    Attributes:
      count: int32 [], iterations done, k.
      value: [], f(x) at the parameters the caller holds; +inf before the first update.
      grad: ∇f(x) there, like the parameters.
      displacement: x − x⁻, like the parameters; 0 at first and after a null step.
      scaling: P, the learned step matrix: [] for "scalar"; for "diagonal" like the
        parameters, at least float32.
      scaling_accumulator: G_P, the sum of squared feedback on P, like `scaling`.
      momentum: b, [], the learned momentum.
      momentum_accumulator: G_b, [], the sum of squared feedback on b.
      hyper_learning_rate: η, [], the rate at which P learns.
      smoothness: L, [], as given, then the mean sampled curvature once `is_known`.
      is_known: bool [], whether L has been measured.
      progress: int32 [], m: accepted steps less two for every null step, at least 0.
      curvature_sum: [], the sum of the curvature samples.
      curvature_count: int32 [], how many there are.
    """

    count: jax.Array
    value: jax.Array
    grad: Any
    displacement: Any
    scaling: Any
    scaling_accumulator: Any
    momentum: jax.Array
    momentum_accumulator: jax.Array
    hyper_learning_rate: jax.Array
    smoothness: jax.Array
    is_known: jax.Array
    progress: jax.Array
    curvature_sum: jax.Array
    curvature_count: jax.Array


class _Point(NamedTuple):
    """Parameters with the value and gradient of the objective there."""

    params: Any
    value: jax.Array
    grad: Any


class _Learnt(NamedTuple):
    """The part of the state that the feedback at a test point changes."""

    scaling: Any
    scaling_accumulator: Any
    momentum: jax.Array
    momentum_accumulator: jax.Array


def hdm_hb(
    smoothness: Any,
    hyper_learning_rate: Any = None,
    momentum_learning_rate: Any = 5.0,
    *,
    scaling: str = "diagonal",
    momentum: Any = 0.95,
    max_momentum: Any = 0.9995,
    max_scaling: Any = 1e10,
    curvature_window: Any = 200,
    epsilon: Any = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    """Descends a full-batch objective with a step matrix and a momentum it learns.

        y   = x − P∘g + b (x − x⁻)
        D   = ‖g‖² + ε                   once L is known: ‖g‖² + ¼ L² ‖x − x⁻‖²
        q_P = −∇f(y)∘g / D               scalar P: −⟨∇f(y), g⟩ / D
        q_b = ⟨∇f(y), x − x⁻⟩ / D
        G_P ← G_P + q_P²;   P ← clip(P − η q_P / (√G_P + ε), 0, max_scaling/L)
        G_b ← G_b + q_b²;   b ← clip(b − η_b q_b / (√G_b + ε), 0, max_momentum)
        x⁻  ← x;   x ← y if f(y) < f(x), else x stays: a null step

    L starts as a guess. While it is one, η ← max(0.8 η, 0.001 η_P) at every k with
    k mod 50 = 49. A count m goes up by one with an accepted step, and down by two, at
    most to 0, with a null step. As soon as m > W, L becomes the mean of
    ‖∇f(y) − ∇f(x)‖/‖y − x‖ over the accepted steps longer than 0.001, and is known:
    η ← 1/L, G_P ← 0.

    Use it on ill-conditioned deterministic problems, where gradient descent crawls. Not
    for minibatches: the null step compares values of one and the same objective. The
    first iteration is always a null step, which teaches P its first value. Cost: one
    value and gradient a step, at the test point, where those of the current point come
    from the state by `optax.value_and_grad_from_state(value_fn)`; four copies of the
    parameters for a diagonal P, two for a scalar one. Called as a line search is:

        updates, state = rule.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn)

    `value` and `grad` are those of `params`; the step follows `grad`, whatever stands
    before the rule in a chain. `value_fn(params, ...)` gets those of the other extra
    arguments that it has parameters for. To be taken from the state its value must come
    in the state's dtype: that of the parameters, or float32 where that is wider. Where
    f(y) or ∇f(y) is not finite the step is a null step, and P, b, G_P and G_b stay as
    they were.

    Args:
      smoothness: L > 0, an estimate of the Lipschitz constant of ∇f.
      hyper_learning_rate: η_P ≥ 0, the first η, in the units of P, which are those of
        1/L; None for 10/L. Sane: 0.1/L to 100/L.
      momentum_learning_rate: η_b ≥ 0. Sane: 1 to 100.
      scaling: "diagonal" (P has an entry a parameter) or "scalar" (P is one number).
      momentum: the first b, in [0, max_momentum].
      max_momentum: in (0, 1).
      max_scaling: the upper end of P in units of 1/L, above 0.
      curvature_window: W ≥ 1; for a budget of T iterations the authors take
        max(min(T/4, 200), 20).
      epsilon: ε > 0, keeps the quotients finite.

    Returns:
      A rule whose state is an `HDMHBState`.

    Raises:
      ValueError: an argument outside its range (traced values are not looked at); in
        `init`, parameters that are not real and floating; in `update`, a missing
        `params`, `value`, `grad` or `value_fn`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from metax.hypergradient import hdm_hb
      >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([1.0, 1e-3]) * (x - 1.0) ** 2)
      >>> rule, params = hdm_hb(smoothness=1.0), jnp.array([3.0, 3.0])
      >>> state = rule.init(params)
      >>> for _ in range(40):
      ...     value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
      ...     point = {"value": value, "grad": grad, "value_fn": loss}
      ...     updates, state = rule.update(grad, state, params, **point)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.4f}")
      0.0000

    Reference:
      Chu, Gao, Ye, Udell, Provable and Practical Online Learning Rate Adaptation with
      Hypergradient Descent, ICML 2025, arXiv 2502.11229.

    Note:
      Two additions to the published iteration: the guard for values that are not
      finite, and that L stays a guess until a curvature above 0 has been sampled.
    """
    check_hdm_arguments(
        scaling,
        smoothness=smoothness,
        hyper_learning_rate=hyper_learning_rate,
        momentum_learning_rate=momentum_learning_rate,
        max_momentum=max_momentum,
        momentum=momentum,
        max_scaling=max_scaling,
        curvature_window=curvature_window,
        epsilon=epsilon,
    )
    first_rate = 10 / smoothness if hyper_learning_rate is None else hyper_learning_rate
    is_scalar = scaling == "scalar"
    learn = partial(
        _learn,
        is_scalar=is_scalar,
        momentum_learning_rate=momentum_learning_rate,
        max_momentum=max_momentum,
        max_scaling=max_scaling,
        epsilon=epsilon,
    )

    def init_fn(params: Any) -> HDMHBState:
        return _initial_state(params, smoothness, first_rate, is_scalar, momentum)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, HDMHBState]:
        del updates
        check_given(params=params, value=value, grad=grad, value_fn=value_fn)
        value = jnp.asarray(value, state.value.dtype)
        x = _Point(params, value, optax.tree.cast_like(grad, state.grad))
        step = _test_step(state, x, is_scalar)
        y = _evaluate(value_fn, optax.apply_updates(params, step), extra_args, x)
        learnt, is_usable = learn(state, x, y)
        is_lower = is_usable & (y.value < x.value)
        state = _advance(state, learnt, x, y, is_lower, first_rate, curvature_window)
        return select(is_lower, step, optax.tree.zeros_like(step)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _initial_state(
    params: Any, smoothness: Any, rate: Any, is_scalar: bool, momentum: Any
) -> HDMHBState:
    """Fresh buffers throughout: the caller may donate what it gave and what it got."""
    check_real(params)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))

    def zeros() -> Any:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)

    def no_scaling() -> Any:
        if is_scalar:
            return jnp.zeros((), dtype)
        return jax.tree.map(lambda p: jnp.zeros(p.shape, rate_dtype(p)), params)

    return HDMHBState(
        count=jnp.zeros((), jnp.int32),
        value=jnp.full((), jnp.inf, dtype),
        grad=zeros(),
        displacement=zeros(),
        scaling=no_scaling(),
        scaling_accumulator=no_scaling(),
        momentum=jnp.array(momentum, dtype),
        momentum_accumulator=jnp.zeros((), dtype),
        hyper_learning_rate=jnp.array(rate, dtype),
        smoothness=jnp.array(smoothness, dtype),
        is_known=jnp.zeros((), bool),
        progress=jnp.zeros((), jnp.int32),
        curvature_sum=jnp.zeros((), dtype),
        curvature_count=jnp.zeros((), jnp.int32),
    )


def _test_step(state: HDMHBState, x: _Point, is_scalar: bool) -> Any:
    """y − x = b (x − x⁻) − P∘g, in the dtypes of the parameters."""

    def step(p: jax.Array, g: jax.Array, d: jax.Array, rate: jax.Array) -> jax.Array:
        return (state.momentum * d - rate * g).astype(p.dtype)

    rates = state.scaling
    if is_scalar:
        rates = jax.tree.map(lambda _: state.scaling, x.params)
    return jax.tree.map(step, x.params, x.grad, state.displacement, rates)


def _evaluate(value_fn: Any, params: Any, extra_args: dict, like: _Point) -> _Point:
    """The one evaluation of an update, in the dtypes of the point it is compared with.

    Arguments that `value_fn` has no name for are meant for others in a chain.
    """
    named = inspect.signature(value_fn).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in named.values()):
        extra_args = {name: x for name, x in extra_args.items() if name in named}
    value, grad = jax.value_and_grad(value_fn)(params, **extra_args)
    return _Point(params, value.astype(like.value.dtype), grad)


def _learn(
    state: HDMHBState,
    x: _Point,
    y: _Point,
    *,
    is_scalar: bool,
    momentum_learning_rate: Any,
    max_momentum: Any,
    max_scaling: Any,
    epsilon: Any,
) -> tuple[_Learnt, jax.Array]:
    """What y teaches P and b, and whether y was fit to teach; else they stay."""
    g, g_y, d = _wide(x.grad), _wide(y.grad), _wide(state.displacement)
    curvature_term = 0.25 * state.smoothness**2 * _dot(d, d)
    scale = _dot(g, g) + jnp.where(state.is_known, curvature_term, epsilon)
    if is_scalar:
        q_scaling = -_dot(g_y, g) / scale
    else:
        q_scaling = jax.tree.map(lambda a, b: -a * b / scale, g_y, g)
    q_momentum = _dot(g_y, d) / scale
    before = _Learnt(
        scaling=state.scaling,
        scaling_accumulator=state.scaling_accumulator,
        momentum=state.momentum,
        momentum_accumulator=state.momentum_accumulator,
    )
    eta, max_rate = state.hyper_learning_rate, max_scaling / state.smoothness
    adagrad = partial(_adagrad, epsilon=epsilon)
    candidate = _Learnt(
        *adagrad(before.scaling, before[1], q_scaling, eta, max_rate),
        *adagrad(
            before.momentum, before[3], q_momentum, momentum_learning_rate, max_momentum
        ),
    )
    is_usable = all_finite(y.value, y.grad, candidate)
    return select(is_usable, candidate, before), is_usable


def _adagrad(
    learnt: Any, accumulator: Any, q: Any, rate: Any, upper: Any, epsilon: Any
) -> tuple[Any, Any]:
    """G ← G + q²;  z ← clip(z − η q/(√G + ε), 0, upper), for every entry z."""

    def step(z: jax.Array, total: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.clip(z - rate * q / (_sqrt(total) + epsilon), 0, upper)

    accumulator = jax.tree.map(lambda total, q: total + q**2, accumulator, q)
    return jax.tree.map(step, learnt, accumulator, q), accumulator


def _advance(
    state: HDMHBState,
    learnt: _Learnt,
    x: _Point,
    y: _Point,
    is_lower: jax.Array,
    first_rate: Any,
    window: Any,
) -> HDMHBState:
    """Moves to y where it is lower, and keeps the schedule of η and L."""
    move = optax.tree.sub(y.params, x.params)
    eta = _decayed(state, first_rate)
    sample, is_sample = _curvature(move, x, y)
    is_sample = is_sample & is_lower
    curvature_sum = state.curvature_sum + jnp.where(is_sample, sample, 0)
    curvature_count = state.curvature_count + is_sample
    null_step = jnp.maximum(0, state.progress - 2)
    progress = jnp.where(is_lower, state.progress + 1, null_step)
    becomes_known = (progress > window) & ~state.is_known & (curvature_sum > 0)
    mean = curvature_sum / jnp.maximum(1, curvature_count)
    no_history = optax.tree.zeros_like(learnt.scaling_accumulator)
    return HDMHBState(
        count=state.count + 1,
        value=select(is_lower, y.value, x.value),
        grad=select(is_lower, y.grad, x.grad),
        displacement=select(is_lower, move, optax.tree.zeros_like(move)),
        scaling=learnt.scaling,
        scaling_accumulator=select(
            becomes_known, no_history, learnt.scaling_accumulator
        ),
        momentum=learnt.momentum,
        momentum_accumulator=learnt.momentum_accumulator,
        hyper_learning_rate=select(becomes_known, 1 / mean, eta),
        smoothness=select(becomes_known, mean, state.smoothness),
        is_known=state.is_known | becomes_known,
        progress=progress,
        curvature_sum=curvature_sum,
        curvature_count=curvature_count,
    )


def _decayed(state: HDMHBState, first_rate: Any) -> jax.Array:
    """η ← max(0.8 η, 0.001 η_P) where k mod 50 = 49 and L is a guess."""
    is_due = ((state.count + 1) % 50 == 49) & ~state.is_known
    eta = state.hyper_learning_rate
    lowest = 1e-3 * jnp.asarray(first_rate, eta.dtype)
    return jnp.where(is_due, jnp.maximum(0.8 * eta, lowest), eta)


def _curvature(move: Any, x: _Point, y: _Point) -> tuple[jax.Array, jax.Array]:
    """‖∇f(y) − ∇f(x)‖/‖y − x‖, and whether y − x is long enough to tell."""
    change = optax.tree.sub(_wide(y.grad), _wide(x.grad))
    length, change = (_sqrt(_dot(t, t)) for t in (_wide(move), change))
    is_long = length > 1e-3
    sample = change / jnp.where(is_long, length, 1)
    return sample, is_long & jnp.isfinite(sample)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(rate_dtype(leaf)), tree)


def _dot(a: Any, b: Any) -> Any:
    # Sums of products, not matrix products, which accelerators round to fewer bits.
    return optax.tree.sum(optax.tree.mul(a, b))


def _sqrt(square: jax.Array) -> jax.Array:
    # The slope of the root at 0 is infinite and would make reverse mode NaN.
    is_positive = square != 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, square, 1)), 0)
