"""What both ways of learning a controller share: its state, and an update of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.autoloss.controllers import Controller
from metax.autoloss.dispatching import keep
from metax.autoloss.episodes import improves
from metax.autoloss.features import Features
from metax.autoloss.restarts import Restart
from metax.autoloss.states import AutoLossState
from metax.base import AlternatingProblem, check_key

__all__ = ["Learner", "begin", "descend", "note_best", "start_anew"]

Phi = Any


class Learner(NamedTuple):
    """What does not change while a controller is learned; see `autoloss`."""

    problem: AlternatingProblem
    controller: Controller
    features: Features
    num_steps: int
    meta_optimizer: optax.GradientTransformation
    entropy_coefficient: Any
    reward_scale: Callable[[jax.Array], Any]
    dispatch: str
    restart: Restart | None
    early_stopping: bool


def begin(learner: Learner, key: jax.Array) -> AutoLossState:
    """The state before the first update, without what PPO adds."""
    check_key(key, "autoloss(...).init(key=...)")
    phi = learner.controller.init(key, learner.features.spec.size)
    worst = -jnp.inf if learner.problem.maximize else jnp.inf
    return AutoLossState(
        phi=phi,
        meta_state=learner.meta_optimizer.init(phi),
        feature_state=learner.features.init()[0],
        baseline=jnp.zeros(()),
        num_updates=jnp.int32(0),
        best_phi=phi,
        best_metric=jnp.full((), worst, jnp.zeros(()).dtype),
        online=(),
    )


def start_anew(
    learner: Learner, state: AutoLossState, key: jax.Array, fired: jax.Array
) -> AutoLossState:
    """Draws φ and the meta-optimizer's state anew, if a restart rule asks for it."""
    if learner.restart is None or not learner.restart.reinitialize:
        return state
    phi = learner.controller.init(key, learner.features.spec.size)
    meta_state = learner.meta_optimizer.init(phi)
    phi, meta_state = keep(fired, (phi, meta_state), (state.phi, state.meta_state))
    return state._replace(phi=phi, meta_state=meta_state)


def descend(
    learner: Learner,
    phi: Phi,
    meta_state: Any,
    loss_of: Callable[[Phi], jax.Array],
) -> tuple[Phi, Any, jax.Array, jax.Array]:
    """One step of the meta-optimizer; where the gradient is not finite, none.

    Returns:
      φ, the meta-optimizer's state, the loss, and the norm of its gradient.
    """
    loss, gradient = jax.value_and_grad(loss_of)(phi)
    norm = optax.tree.norm(gradient)
    updates, moved = learner.meta_optimizer.update(gradient, meta_state, phi)
    new = (optax.apply_updates(phi, updates), moved)
    phi, meta_state = keep(jnp.isfinite(norm), new, (phi, meta_state))
    return phi, meta_state, loss, norm


def note_best(
    learner: Learner, state: AutoLossState, led_by: Phi, metric: jax.Array
) -> AutoLossState:
    """Keeps the φ that led the best run so far."""
    better = improves(learner.problem, metric, state.best_metric)
    return state._replace(
        best_phi=keep(better, led_by, state.best_phi),
        best_metric=jnp.where(better, metric, state.best_metric),
    )
