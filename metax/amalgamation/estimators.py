"""Three estimates of the gradient of a truncation's objective in the student's weights.

Each is `estimate(loss_fn, theta, carry, key) -> (gradient, carry, (loss, measured))`,
where `loss_fn(theta, optimizee) -> loss, (optimizee, measured)` is one optimizee's
truncation and the carry holds a batch of optimizees.

* `bptt`: reverse mode through the truncation; blind beyond it.
* `pes`: persistent evolution strategies, unbiased over the whole unroll.
* `es`: evolution strategies on the truncation, blind beyond it as `bptt` is.

The last two differentiate nothing: memory of one step, students without a derivative,
two forward truncations a task. Their variance falls with the number of tasks, of which
they need many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["Carry", "PESState", "bptt", "es", "over_tasks", "pes", "pes_start"]

Params = Any
LossFn = Callable[[Params, Any], tuple[jax.Array, tuple[Any, Any]]]
Estimate = tuple[Params, "Carry", tuple[jax.Array, Any]]


class PESState(NamedTuple):
    """What persistent evolution strategies carry for each task, leaves [B, ...].

    Attributes:
      accumulator: the sum of the perturbations since the last restart.
      params: parameters of the run with the negative perturbations.
      student_state: its state of the student's rule.
    """

    accumulator: Params
    params: Params
    student_state: Any


class Carry(NamedTuple):
    """What an estimator takes and returns.

    Attributes:
      optimizees: `Optimizee`s, leaves [B, ...].
      estimator_state: a `PESState`, else `()`.
    """

    optimizees: Any
    estimator_state: Any


def bptt(loss_fn: LossFn, theta: Params, carry: Carry, key: jax.Array) -> Estimate:
    """The gradient of the tasks' mean objective, by reverse mode."""
    del key

    def objective(theta: Params) -> tuple[jax.Array, Any]:
        losses, (optimizees, measured) = over_tasks(loss_fn)(theta, carry.optimizees)
        return losses.mean(), (optimizees, measured)

    with_aux = jax.value_and_grad(objective, has_aux=True)
    (loss, (optimizees, measured)), gradient = with_aux(theta)
    return gradient, carry._replace(optimizees=optimizees), (loss, measured)


def es(std: Any) -> Callable[..., Estimate]:
    """Truncated evolution strategies, in antithetic pairs.

        ∇ ≈ mean over tasks of ξ (L(φ + ξ) - L(φ - ξ)) / (2σ²),    ξ ~ N(0, σ² I)

    Both signs start from the common state; the run with φ + ξ goes on.

    Args:
      std: σ, above 0.
    """

    def estimate(
        loss_fn: LossFn, theta: Params, carry: Carry, key: jax.Array
    ) -> Estimate:
        optimizees = carry.optimizees
        noise = _noise(key, theta, std, _num_tasks(optimizees))
        up, down = _both_signs(loss_fn, theta, noise, optimizees, optimizees)
        gradient = _smoothed(noise, up[0] - down[0], std)
        return gradient, carry._replace(optimizees=up[1]), _mean_of(up, down)

    return estimate


def pes(std: Any) -> Callable[..., Estimate]:
    """Persistent evolution strategies: truncations without the bias of truncation.

        ∇ ≈ mean over tasks of Ξ (L⁺ - L⁻) / (2σ²),    Ξ = Σ ξ since the last restart

    One ξ a task and truncation; either sign carries on its own optimizee.

    Args:
      std: σ, above 0.

    Reference:
      Vicol, Metz and Sohl-Dickstein, 2021, arXiv:2112.13835, Algorithm 2.
    """

    def estimate(
        loss_fn: LossFn, theta: Params, carry: Carry, key: jax.Array
    ) -> Estimate:
        optimizees, memory = carry
        noise = _noise(key, theta, std, _num_tasks(optimizees))
        total = jax.tree.map(jnp.add, memory.accumulator, noise)
        negative = optimizees._replace(
            params=memory.params, student_state=memory.student_state
        )
        up, down = _both_signs(loss_fn, theta, noise, optimizees, negative)
        gradient = _smoothed(total, up[0] - down[0], std)
        memory = PESState(total, down[1].params, down[1].student_state)
        return gradient, Carry(up[1], memory), _mean_of(up, down)

    return estimate


def pes_start(theta: Params, params: Params, student_state: Any) -> PESState:
    """The state after a restart of the tasks: nothing summed, both signs together."""
    num = len(jax.tree.leaves(params)[0])
    zeros = jax.tree.map(lambda w: jnp.zeros((num, *w.shape), w.dtype), theta)
    # copies: an array that stands twice in a state cannot be donated
    return PESState(zeros, *jax.tree.map(jnp.copy, (params, student_state)))


def over_tasks(fn: Callable[..., Any], in_axes: Any = (None, 0)) -> Callable[..., Any]:
    """`vmap` over tasks; a single task is run without a batch axis.

    XLA's batched products over one matrix are slower than the product.
    """

    def mapped(*args: Any) -> Any:
        with_axis = zip(args, in_axes, strict=True)
        num = next(_num_tasks(arg) for arg, axis in with_axis if axis == 0)
        if num > 1:
            return jax.vmap(fn, in_axes)(*args)
        first = lambda arg, axis: arg if axis is None else jax.tree.map(_first, arg)
        alone = fn(*(first(*pair) for pair in zip(args, in_axes, strict=True)))
        return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), alone)

    return mapped


def _first(leaf: jax.Array) -> jax.Array:
    return leaf[0]


def _num_tasks(tree: Any) -> int:
    return len(jax.tree.leaves(tree)[0])


def _noise(key: jax.Array, theta: Params, std: Any, num: int) -> Params:
    """ξ for each task, leaves [B, ...]."""
    keys = optax.tree.split_key_like(key, theta)
    draw = lambda w, k: std * jax.random.normal(k, (num, *w.shape), w.dtype)
    return jax.tree.map(lambda w, k: draw(w, k).astype(w.dtype), theta, keys)


def _both_signs(
    loss_fn: LossFn, theta: Params, noise: Params, positive: Any, negative: Any
) -> tuple[Any, Any]:
    """(losses [B], optimizees, measured) at θ + ξ and at θ - ξ."""
    run = over_tasks(loss_fn, (0, 0))
    up = run(jax.tree.map(jnp.add, theta, noise), positive)
    down = run(jax.tree.map(jnp.subtract, theta, noise), negative)
    return tuple((losses, *rest) for losses, rest in (up, down))  # type: ignore[return-value]


def _smoothed(noise: Params, difference: jax.Array, std: Any) -> Params:
    """mean over tasks of ξ · difference / (2σ²)."""
    weigh = lambda xi: jnp.tensordot(difference.astype(xi.dtype), xi, 1)
    num = len(difference)
    return jax.tree.map(
        lambda xi: (weigh(xi) / (2 * std**2 * num)).astype(xi.dtype), noise
    )


def _mean_of(up: Any, down: Any) -> tuple[jax.Array, Any]:
    """Loss and measurements, averaged over both signs where they are numbers."""
    loss = (up[0].mean() + down[0].mean()) / 2

    def mean(a: jax.Array, b: jax.Array) -> jax.Array:
        return a & b if a.dtype == bool else (a + b) / 2

    return loss, jax.tree.map(mean, up[2], down[2])
