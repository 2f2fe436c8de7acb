"""Features scaled by their own running statistics, and statistics that stand still."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_has, check_number, refuse
from metax.autoloss.decisions import Observation
from metax.autoloss.vectors import Features

__all__ = ["NormState", "frozen", "running_norm"]


class NormState(NamedTuple):
    """The state of the features below, and statistics of their vectors.

    Attributes:
      inner: of the features below.
      count: int32 [], vectors so far, n.
      mean: [F], μ.
      variance: [F], σ². Not the sum M of squared distances: to that a long training in
        single precision could no longer add.
    """

    inner: Any
    count: jax.Array
    mean: jax.Array
    variance: jax.Array


def running_norm(
    features: Features, *, clip: float = 5.0, epsilon: float = 1e-6
) -> Features:
    """Normalises each entry by its running mean and variance.

        n ← n + 1,    Δ = x - μ,    μ ← μ + Δ/n,    σ² ← σ² + (Δ (x - μ) - σ²)/n
        y = clip((x - μ)/σ),    0 where σ² < ε

    Statistics survive a run: `reset` keeps them, and `merge` puts those of several runs
    together as if one had seen it all. Of a run that begins with (n₀, μ₀, σ₀²) and ends
    with (n₁, μ₁, σ₁²) the own part is, with w = n₁/n,

        n = n₁ - n₀,    μ = μ₀ + w (μ₁ - μ₀)
        σ² = σ₀² + w (σ₁² - σ₀²) - (μ - μ₀)² n₀/n₁

    The vector before a first step is normalised but not counted. A vector that is not
    finite, or too large to be squared, is not counted either, and its entries that are
    not finite pass as 0: one run that diverges does not spoil the others.

    Args:
      features: what to normalise.
      clip: the largest magnitude that leaves it, above 0.
      epsilon: ε, above 0.

    Returns:
      The features; those below must be without statistics.

    Raises:
      ValueError: an argument out of range, or features that have statistics already.

    Reference:
      Chan, Golub & LeVeque, Updating Formulae and a Pairwise Algorithm for Computing
      Sample Variances, 1979, equation 2.1.

    Example:
      >>> from metax.autoloss import features
      >>> scaled = features.running_norm(features.released("regression"))
      >>> state, x = scaled.init()
      >>> x.tolist(), int(state.count)
      ([0.0, 0.0, 0.0, 0.0, 0.0], 0)
    """
    check_has("running_norm", "features", features, "`Features`", "init", "spec")
    check_number("running_norm", "clip", clip, above=0)
    check_number("running_norm", "epsilon", epsilon, above=0)
    if "running_norm" in features.spec.arguments:
        rule = "must be features without statistics"
        refuse("running_norm", "features", rule, features.spec.name)
    own = {"running_norm": {"clip": clip, "epsilon": epsilon}}
    spec = features.spec._replace(arguments={**features.spec.arguments, **own})

    def scaled(state: NormState, x: jax.Array) -> tuple[NormState, jax.Array]:
        return state, _normalized(state, x, clip, epsilon)

    def init() -> tuple[NormState, jax.Array]:
        inner, x = features.init()
        zeros = jnp.zeros_like(x)
        return scaled(NormState(inner, jnp.zeros((), jnp.int32), zeros, zeros), x)

    def update(
        state: NormState, observation: Observation
    ) -> tuple[NormState, jax.Array]:
        inner, x = features.update(state.inner, observation)
        return scaled(_counted(state, x)._replace(inner=inner), x)

    def update_inner(
        state: NormState, observation: Observation
    ) -> tuple[NormState, jax.Array]:
        inner, x = features.update(state.inner, observation)
        return scaled(state._replace(inner=inner), x)

    def reset(state: NormState) -> tuple[NormState, jax.Array]:
        inner, x = features.reset(state.inner)
        return scaled(state._replace(inner=inner), x)

    def merge(before: NormState, states: NormState) -> NormState:
        inner = features.merge(before.inner, states.inner)
        return _merged(before, states)._replace(inner=inner)

    keep = lambda before, states: before
    fixed = Features(init, update_inner, reset, keep, spec)
    return Features(init, update, reset, merge, spec, fixed)


def frozen(features: Features) -> Features:
    """The same features with statistics that no longer move.

    For runs that are led and not learned from. Features without statistics are returned
    as they are, and so are frozen ones.

    Args:
      features: any.

    Returns:
      Features of the same spec, whose state is that of `features`.
    """
    check_has("frozen", "features", features, "`Features`", "fixed", "spec")
    return features if features.fixed is None else features.fixed


def _counted(state: NormState, x: jax.Array) -> NormState:
    """Welford's update."""
    count = state.count + 1
    distance = x - state.mean
    mean = state.mean + distance / count
    square = distance * (x - mean)
    variance = state.variance + (square - state.variance) / count
    fine = jnp.all(jnp.isfinite(mean) & jnp.isfinite(variance))
    return NormState(
        inner=state.inner,
        count=jnp.where(fine, count, state.count),
        mean=jnp.where(fine, mean, state.mean),
        variance=jnp.where(fine, variance, state.variance),
    )


def _normalized(
    state: NormState, x: jax.Array, clip: float, epsilon: float
) -> jax.Array:
    scale = jnp.sqrt(jnp.maximum(state.variance, epsilon))
    y = jnp.clip((x - state.mean) / scale, -clip, clip)
    return jnp.where((state.variance < epsilon) | ~jnp.isfinite(x), 0, y)


def _merged(before: NormState, states: NormState) -> NormState:
    """The statistics of all runs, those that they began with counted once."""
    column = lambda n: jnp.asarray(n, before.mean.dtype)[:, None]
    own = states.count - before.count
    n, n1, n0 = column(own), column(states.count), before.count
    known = n > 0
    w = jnp.where(known, n1, 0) / jnp.where(known, n, 1)
    mean = before.mean + w * (states.mean - before.mean)
    variance = before.variance + w * (states.variance - before.variance)
    variance -= jnp.square(mean - before.mean) * n0 / jnp.maximum(n1, 1)
    variance = jnp.where(known, jnp.maximum(variance, 0), 0)

    count = n0 + jnp.sum(own, dtype=own.dtype)
    shares, share0 = n / jnp.maximum(count, 1), n0 / jnp.maximum(count, 1)
    moved = before.mean + jnp.sum(shares * (mean - before.mean), 0)
    spread = share0 * (before.variance + jnp.square(before.mean - moved))
    spread += jnp.sum(shares * (variance + jnp.square(mean - moved)), 0)
    new = NormState(before.inner, count, moved, spread.astype(moved.dtype))
    fine = jnp.all(jnp.isfinite(new.mean) & jnp.isfinite(new.variance))
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, before)
