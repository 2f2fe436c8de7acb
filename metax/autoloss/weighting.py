"""Rules that weigh losses instead of choosing one, as policies.

Each gives `Decision.weights`, so that a step follows Σ_m w_m ℓ_m on the groups of one
fixed action. One table then holds schedules and weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_count, check_number
from metax.autoloss.decisions import Decision, Observation, Policy
from metax.autoloss.vectors import as_float

__all__ = [
    "dynamic_weight_average",
    "grad_norm",
    "random_weights",
    "uncertainty_weighting",
]


class AverageState(NamedTuple):
    """The last two values of each loss.

    Attributes:
      count: int32 [], values so far.
      last: [M], ℓ_m(t-1).
      before: [M], ℓ_m(t-2).
    """

    count: jax.Array
    last: jax.Array
    before: jax.Array


class NormalizedState(NamedTuple):
    """Weights, and the losses that training rates are relative to.

    Attributes:
      seen: bool [], whether there was a step.
      first: [M], ℓ_m(0).
      weights: [M], of sum M.
    """

    seen: jax.Array
    first: jax.Array
    weights: jax.Array


def uncertainty_weighting(
    num_losses: int, learning_rate: Any = 0.025, *, action: int = 0
) -> Policy:
    """Weights each loss by a variance that is learned along with the task.

        w_m = e^{-s_m},    s_m ← s_m - η ∂/∂s_m (e^{-s_m} ℓ_m + s_m)

    with s_m = 0 at first: the logarithm of the variance of task m's noise.

    Args:
      num_losses: M, at least 1.
      learning_rate: η, at least 0; may be traced.
      action: whose groups move; those of all losses.

    Returns:
      The policy.

    Raises:
      ValueError: an argument out of range.

    Note:
      The paper trains s by the optimizer of the task; here it descends plainly.

    Reference:
      Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
      Geometry and Semantics, 2017, arXiv:1705.07115, equation 10.
    """
    _check("uncertainty_weighting", num_losses, action)
    check_number("uncertainty_weighting", "learning_rate", learning_rate, least=0)

    def act(s: jax.Array, key: jax.Array) -> tuple[jax.Array, Decision]:
        return s, _weigh(action, jnp.exp(-s))

    def observe(s: jax.Array, observation: Observation) -> jax.Array:
        slope = 1 - jnp.exp(-s) * as_float(observation.losses)
        return s - learning_rate * jnp.where(observation.refreshed, slope, 0)

    return Policy(lambda: jnp.zeros(num_losses), act, observe, refresh="chosen")


def dynamic_weight_average(
    num_losses: int, temperature: float = 2.0, *, action: int = 0
) -> Policy:
    """More weight for a loss that falls more slowly than the others.

        r_m = ℓ_m(t-1) / ℓ_m(t-2),    w = M softmax(r / temperature)

    and r_m = 1 until two values are known.

    Args:
      num_losses: M, at least 1.
      temperature: above 0; larger is more even.
      action: whose groups move; those of all losses.

    Returns:
      The policy.

    Raises:
      ValueError: an argument out of range.

    Note:
      In the paper ℓ_m(t) is the mean over an epoch; here it is the loss of step t,
      which is the same with full batches and noisier without.

    Reference:
      Liu et al., End-to-End Multi-Task Learning with Attention, 2018, arXiv:1803.10704,
      equation 7.
    """
    _check("dynamic_weight_average", num_losses, action)
    check_number("dynamic_weight_average", "temperature", temperature, above=0)

    def init() -> AverageState:
        ones = jnp.ones(num_losses)
        return AverageState(jnp.zeros((), jnp.int32), ones, ones)

    def act(state: AverageState, key: jax.Array) -> tuple[AverageState, Decision]:
        zero = (state.before == 0) | (state.count < 2)
        rates = jnp.where(zero, 1, state.last / jnp.where(zero, 1, state.before))
        return state, _weigh(action, num_losses * jax.nn.softmax(rates / temperature))

    def observe(state: AverageState, observation: Observation) -> AverageState:
        losses = as_float(observation.losses)
        return AverageState(state.count + 1, losses, state.last)

    return Policy(init, act, observe, refresh="chosen")


def random_weights(num_losses: int, *, action: int = 0) -> Policy:
    """New random weights at each step: the control for every rule of weighting.

        w = M softmax(z),    z ~ N(0, I)

    Args:
      num_losses: M, at least 1.
      action: whose groups move; those of all losses.

    Returns:
      The policy.

    Raises:
      ValueError: an argument out of range.

    Reference:
      Lin et al., Reasonable Effectiveness of Random Weighting: A Litmus Test for
      Multi-Task Learning, 2021, arXiv:2111.10603, algorithm 1.
    """
    _check("random_weights", num_losses, action)

    def act(state: tuple[()], key: jax.Array) -> tuple[tuple[()], Decision]:
        noise = jax.random.normal(key, (num_losses,))
        return state, _weigh(action, num_losses * jax.nn.softmax(noise))

    return Policy(lambda: (), act, lambda state, observation: state)


def grad_norm(
    num_losses: int, alpha: float = 1.5, learning_rate: Any = 0.025, *, action: int = 0
) -> Policy:
    """Weights under which all losses train at comparable rates.

        G_m = w_m ‖∇ℓ_m‖,    ρ_m = (ℓ_m/ℓ_m(0)) / mean_j (ℓ_j/ℓ_j(0))
        w ← w - η ∂/∂w Σ_m |G_m - mean(G) ρ_m^α|,    then w ← M w / Σ_j w_j

    where mean(G) ρ_m^α counts as a constant. Costs a backward pass for each loss.

    Args:
      num_losses: M, at least 1.
      alpha: α, at least 0: how strongly rates are pulled together.
      learning_rate: η, at least 0; may be traced.
      action: whose groups move; those of all losses.

    Returns:
      The policy; `refresh="all"`.

    Raises:
      ValueError: an argument out of range.

    Note:
      The paper takes gradients in the last shared layer; here they are root mean
      squares over all groups that a loss moves. ℓ_m(0) is the value after the first
      step. A weight does not fall below a thousandth.

    Reference:
      Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
      Multitask Networks, 2017, arXiv:1711.02257, equation 2 and algorithm 1.
    """
    _check("grad_norm", num_losses, action)
    check_number("grad_norm", "alpha", alpha, least=0)
    check_number("grad_norm", "learning_rate", learning_rate, least=0)

    def init() -> NormalizedState:
        ones = jnp.ones(num_losses)
        return NormalizedState(jnp.zeros((), bool), ones, ones)

    def act(state: NormalizedState, key: jax.Array) -> tuple[NormalizedState, Decision]:
        return state, _weigh(action, state.weights)

    def observe(state: NormalizedState, observation: Observation) -> NormalizedState:
        losses, rms = as_float(observation.losses), as_float(observation.gradient_rms)
        first = jnp.where(state.seen, state.first, losses)
        progress = losses / jnp.where(first == 0, 1, first)
        mean = jnp.mean(progress)
        rates = jnp.maximum(progress / jnp.where(mean == 0, 1, mean), 0)
        norms = state.weights * rms
        slope = jnp.sign(norms - jnp.mean(norms) * rates**alpha) * rms
        weights = jnp.maximum(state.weights - learning_rate * slope, 1e-3)
        weights = num_losses * weights / jnp.sum(weights)
        return NormalizedState(jnp.ones((), bool), first, weights)

    return Policy(init, act, observe, refresh="all")


def _check(function: str, num_losses: int, action: int) -> None:
    check_count(function, 1, num_losses=num_losses)
    check_count(function, 0, action=action)


def _weigh(action: int, weights: jax.Array) -> Decision:
    """A decision that is based on no inputs."""
    return Decision(
        action=jnp.asarray(action, jnp.int32),
        log_prob=jnp.zeros(()),
        inputs=jnp.zeros(0),
        weights=weights,
    )
