"""Rules that end a run early and punish it: predicates on observations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_count, check_has, check_number, refuse
from metax.autoloss.decisions import Observation

__all__ = ["Restart", "any_of", "divergence", "identical_actions"]


class Restart(NamedTuple):
    """When a run is given up, and what follows.

    Attributes:
      init: `init() -> state`.
      update: `update(state, observation) -> (state, fired)`, fired a bool [].
      penalty: the advantage of a run that was given up.
      reinitialize: whether the controller is drawn anew before its update.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Observation], tuple[Any, jax.Array]]
    penalty: float
    reinitialize: bool


class RepeatState(NamedTuple):
    """The last action, and how often it was repeated.

    Attributes:
      action: int32 [], -1 before the first.
      repeats: int32 [], how often in a row it was taken again.
    """

    action: jax.Array
    repeats: jax.Array


def identical_actions(
    limit: int = 500, penalty: float = -20.0, reinitialize: bool = True
) -> Restart:
    """Gives up a run whose policy has collapsed to one action.

    Fires when an action was taken again more than `limit` times in a row.

    Args:
      limit: at least 0.
      penalty: the advantage of such a run.
      reinitialize: whether the controller is drawn anew.

    Returns:
      The rule; the defaults are those of the released code for GANs.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> from metax.autoloss import identical_actions
      >>> identical_actions(limit=100).penalty
      -20.0
    """
    check_count("identical_actions", 0, limit=limit)
    check_number("identical_actions", "penalty", penalty)

    def init() -> RepeatState:
        return RepeatState(jnp.full((), -1, jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        state: RepeatState, observation: Observation
    ) -> tuple[RepeatState, jax.Array]:
        action = observation.action.astype(jnp.int32)
        repeats = jnp.where(action == state.action, state.repeats + 1, 0)
        return RepeatState(action, repeats), repeats > limit

    return Restart(init, update, penalty, reinitialize)


def divergence(
    loss: int,
    above: float,
    at_step: int = 100,
    penalty: float = -20.0,
    reinitialize: bool = False,
) -> Restart:
    """Gives up a run in which a loss is still large, or no number, at one step.

    Needs a policy that has losses measured (`refresh` "chosen" or "all").

    Args:
      loss: index of the loss.
      above: what it must not exceed.
      at_step: after how many decisions it is looked at, at least 1.
      penalty: the advantage of such a run.
      reinitialize: whether the controller is drawn anew.

    Returns:
      The rule.

    Raises:
      ValueError: an argument out of range.
    """
    check_count("divergence", 0, loss=loss)
    check_count("divergence", 1, at_step=at_step)
    check_number("divergence", "above", above)
    check_number("divergence", "penalty", penalty)

    def update(
        state: tuple[()], observation: Observation
    ) -> tuple[tuple[()], jax.Array]:
        # negated, so that it holds of NaN
        large = ~(observation.losses[loss] <= above)
        return state, (observation.step == at_step) & large

    return Restart(lambda: (), update, penalty, reinitialize)


def any_of(*restarts: Restart) -> Restart:
    """Gives up a run as soon as one of several rules does.

    Args:
      *restarts: the rules, at least one.

    Returns:
      The rule, with the strictest consequences whichever fires: the lowest penalty, and
      a new controller where any of them asks for one.

    Raises:
      ValueError: no rule.
    """
    if not restarts:
        refuse("any_of", "restarts", "must be at least one", "none")
    for one in restarts:
        fields = ("init", "update", "penalty")
        check_has("any_of", "restarts", one, "made of `Restart`s", *fields)

    def init() -> tuple[Any, ...]:
        return tuple(restart.init() for restart in restarts)

    def update(
        states: tuple[Any, ...], observation: Observation
    ) -> tuple[tuple[Any, ...], jax.Array]:
        pairs = [
            restart.update(state, observation)
            for restart, state in zip(restarts, states, strict=True)
        ]
        fired = jnp.any(jnp.stack([one for _, one in pairs]))
        return tuple(state for state, _ in pairs), fired

    penalty = min(restart.penalty for restart in restarts)
    return Restart(init, update, penalty, any(r.reinitialize for r in restarts))
