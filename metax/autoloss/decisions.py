"""What a policy sees, what it answers, and what a policy is.

A policy is asked for an action before each step and shown what came of it after the
step. Hand-made schedules, weighting rules and learned controllers are all policies, so
a run does not know by whom it is led.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Decision", "Observation", "Policy", "choose", "drawn"]

State = Any


class Observation(NamedTuple):
    """What there is to see of a run after a step; M losses.

    Values are as old as their last refresh: with `Policy.refresh="chosen"` loss m and
    its gradient are measured only by steps that choose it, at the parameters before the
    step; with "all" everything is measured after each step.

    Attributes:
      step: int32 [], decisions taken so far.
      num_steps: int32 [], decisions in all.
      action: int32 [], the last action, -1 before the first.
      losses: [M], cached values, 0 until first refreshed.
      gradient_rms: [M], ‖∇ℓ_m‖₂ / √dim over the groups of that loss's actions, cached
        likewise.
      refreshed: bool [M], which of them the last step refreshed.
      metric: [], the validation metric at its last refresh, 0 before the first.
      metric_refreshed: bool [], whether the last step refreshed it.
      aux: [M] each, the scalars that losses return beside themselves. Not cached: 0
        where the last step did not refresh them.
      extras: what `AlternatingProblem.observe` returned beside the metric. Not cached:
        zeros where the last step did not refresh the metric.
    """

    step: jax.Array
    num_steps: jax.Array
    action: jax.Array
    losses: jax.Array
    gradient_rms: jax.Array
    refreshed: jax.Array
    metric: jax.Array
    metric_refreshed: jax.Array
    aux: dict[str, jax.Array]
    extras: dict[str, jax.Array]


class Decision(NamedTuple):
    """What a policy answers.

    Attributes:
      action: int32 [], index into the actions of the problem.
      log_prob: [], its log probability under the policy; 0 for a deterministic one.
      inputs: [F], what the decision was based on; F = 0 for schedules.
      weights: None; or [M], and then the step follows Σ_m weights_m ℓ_m on the groups
        of `action`, whose own loss no longer counts.
    """

    action: jax.Array
    log_prob: jax.Array
    inputs: jax.Array
    weights: jax.Array | None = None


class Policy(NamedTuple):
    """Pure functions that lead a run.

    Attributes:
      init: `init() -> state`.
      act: `act(state, key) -> (state, decision)`; where there is a `draw`, it also
        takes what that made of the key.
      observe: `observe(state, observation) -> state`, after each step.
      refresh: which losses and gradient norms it wants to see after a step: "none",
        "chosen" or "all".
      observe_every: steps between two refreshes of the metric; None for the problem's
        `validate_every`.
      draw: `draw(key)`, floating-point: all that `act` asks of its key. A run then
        draws for many steps at once, outside of its loop, the same numbers. None where
        `act` wants the key.
    """

    init: Callable[[], State]
    act: Callable[[State, jax.Array], tuple[State, Decision]]
    observe: Callable[[State, Observation], State]
    refresh: Literal["none", "chosen", "all"] = "none"
    observe_every: int | None = None
    draw: Callable[[jax.Array], jax.Array] | None = None


def drawn(draw: Callable[[jax.Array], jax.Array], key: jax.Array) -> jax.Array:
    """`draw(key)`, or `key` where that is what was drawn of it."""
    return key if jnp.issubdtype(key.dtype, jnp.floating) else draw(key)


def choose(logits: jax.Array, gumbel: jax.Array) -> jax.Array:
    """An action of probability softmax(logits): `jax.random.categorical` in two parts.

    Args:
      logits: [Q].
      gumbel: [Q], what `jax.random.gumbel` draws.

    Returns:
      int32 [].
    """
    return jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)
