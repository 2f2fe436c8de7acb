"""Policy gradients as pure functions of a trajectory, and the advantages they weigh.

Both losses differentiate log π_φ(a | x) alone: nothing flows through the run that was
made, so a reward may be anything that can be measured.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_has, check_number, check_one_of, refuse
from metax.autoloss.controllers import Controller
from metax.autoloss.rollouts import Trajectory

__all__ = [
    "Buffer",
    "Transition",
    "advantages",
    "clip_advantage",
    "entropy",
    "one_step_targets",
    "ppo_loss",
    "push",
    "reinforce_loss",
]

Phi = Any


def reinforce_loss(
    phi: Phi,
    controller: Controller,
    trajectory: Trajectory,
    advantage: jax.Array,
    *,
    entropy_coefficient: Any = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
) -> jax.Array:
    """The loss whose gradient is REINFORCE's estimate, with the sign to be minimised.

        L(φ) = -1/S Σ_s Σ_t live_st [(A_s + r_st) log π_φ(a_st|x_st) + c_H H(π_φ(x_st))]

    with r_st the step rewards of the trajectory. With "sum" and an unbiased advantage
    -∇L is an unbiased estimate of ∇E[R] (the paper's Eq. 2). One batched forward and
    backward pass of the controller over S·T inputs.

    Args:
      phi: the controller's parameters.
      controller: the policy.
      trajectory: of one run, leaves [T, ...], or of S, [S, T, ...].
      advantage: A, scalar, [S] or [S, T].
      entropy_coefficient: c_H, at least 0.
      reduction: "sum" over the steps; "mean" divides each run's sum by its live steps.

    Returns:
      A scalar.

    Raises:
      ValueError: another reduction, a number out of range, or parts whose shapes do not
        fit those of the trajectory.

    Reference:
      Xu et al., AutoLoss: Learning Discrete Schedules for Alternate Optimization, 2019,
      arXiv:1810.02442, Eq. 2. "mean" and the step rewards are the released code's.
    """
    name = "reinforce_loss"
    check_one_of(name, "reduction", reduction, ("sum", "mean"))
    check_number(name, "entropy_coefficient", entropy_coefficient, least=0)
    _check_steps(name, phi, controller, trajectory, advantage)
    logits = controller.logits(phi, trajectory.inputs)
    live = trajectory.live
    weight = _spread(advantage, live) + trajectory.rewards
    terms = jax.lax.stop_gradient(weight) * _log_prob(logits, trajectory.actions)
    terms = jnp.where(live, terms + entropy_coefficient * entropy(logits), 0)
    sums = jnp.sum(terms, axis=-1)
    if reduction == "mean":
        sums /= jnp.maximum(jnp.sum(live, axis=-1), 1)
    return -jnp.mean(sums)


def ppo_loss(
    phi: Phi,
    controller: Controller,
    trajectory: Trajectory,
    advantage: jax.Array,
    targets: jax.Array,
    *,
    old_log_probs: jax.Array | None = None,
    clip: Any = 0.2,
    entropy_coefficient: Any = 0.0,
    value_coefficient: Any = 0.5,
) -> jax.Array:
    """The clipped surrogate of proximal policy optimization, with its critic.

        L(φ) = -mean min(ρ A, clip(ρ, 1 - c, 1 + c) A)
               + c_V mean (target - V_φ(x))² - c_H mean H(π_φ(x)),    ρ = π_φ(a|x)/π_old

    Means are over live steps. At ρ = 1 the first term has the gradient of
    `reinforce_loss` with "mean".

    Args:
      phi: the controller's parameters, a critic's among them.
      controller: made with `critic_hidden`.
      trajectory: leaves [T, ...] or [S, T, ...]; its step rewards are not used.
      advantage: A, scalar, [S] or of the shape of the steps.
      targets: of the critic, of the shape of the steps; held constant.
      old_log_probs: log π_old(a|x); by default those of the trajectory.
      clip: c, above 0.
      entropy_coefficient: c_H, at least 0.
      value_coefficient: c_V, at least 0.

    Returns:
      A scalar.

    Raises:
      ValueError: the controller has no critic, a number is out of range, or parts have
        shapes that do not fit those of the trajectory.

    Reference:
      Schulman et al., Proximal Policy Optimization Algorithms, 2017, arXiv:1707.06347,
      Eqs. 7 and 9.

    Note:
      The released code has the entropy term with the sign of a penalty; here it is a
      bonus.
    """
    if controller.value is None:
        raise ValueError(
            "`ppo_loss(controller=...)` must have a critic; got one without. Make it "
            "by `controller(..., critic_hidden=(32,))`."
        )
    name = "ppo_loss"
    check_number(name, "clip", clip, above=0)
    check_number(name, "entropy_coefficient", entropy_coefficient, least=0)
    check_number(name, "value_coefficient", value_coefficient, least=0)
    _check_steps(name, phi, controller, trajectory, advantage)
    _check_shape(name, "targets", targets, trajectory)
    if old_log_probs is not None:
        _check_shape(name, "old_log_probs", old_log_probs, trajectory)
    logits = controller.logits(phi, trajectory.inputs)
    old = trajectory.log_probs if old_log_probs is None else old_log_probs
    live = trajectory.live
    advantage = jax.lax.stop_gradient(_spread(advantage, live))
    ratio = jnp.exp(_log_prob(logits, trajectory.actions) - old)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    value = controller.value(phi, trajectory.inputs)
    error = jnp.square(jax.lax.stop_gradient(targets) - value)
    terms = -surrogate + value_coefficient * error
    terms -= entropy_coefficient * entropy(logits)
    return jnp.sum(jnp.where(live, terms, 0)) / jnp.maximum(jnp.sum(live), 1)


def entropy(logits: jax.Array) -> jax.Array:
    """H(softmax(logits)) over the last axis, in nats."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def advantages(
    rewards: jax.Array,
    baseline: jax.Array,
    *,
    kind: str,
    baseline_decay: Any,
    baseline_order: str,
    is_first: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What each of S runs is worth more than expected, and the new baseline.

        "ema"            R_s - B,  B ← α B + (1 - α) mean R,  B_0 = mean of the first R
        "leave_one_out"  R_s - mean_{j≠s} R_j
        "normalized"     (R_s - mean R)/(std R + 1e-8)

    Args:
      rewards: R, [S].
      baseline: B, [].
      kind: one of the three.
      baseline_decay: α.
      baseline_order: "before": A with the old B; "after": with the new one.
      is_first: bool [], whether B has seen nothing yet.

    Returns:
      A, [S], and B.
    """
    mean = jnp.mean(rewards)
    old = jnp.where(is_first, mean, baseline)
    new = baseline_decay * old + (1 - baseline_decay) * mean
    if kind == "ema":
        return rewards - (old if baseline_order == "before" else new), new
    if kind == "leave_one_out":
        others = (jnp.sum(rewards) - rewards) / (rewards.size - 1)
        return rewards - others, new
    return (rewards - mean) / (jnp.std(rewards) + 1e-8), new


def clip_advantage(advantage: jax.Array, limits: Any) -> jax.Array:
    """None: as it is; c: into ±c; (low, high): the magnitude into it, sign kept."""
    if limits is None:
        return advantage
    if isinstance(limits, tuple):
        magnitude = jnp.clip(jnp.abs(advantage), *limits)
        return jnp.sign(advantage) * magnitude
    return jnp.clip(advantage, -limits, limits)


class Transition(NamedTuple):
    """What PPO remembers of a decision; with a leading axis, of several.

    Attributes:
      inputs: [F], before the step.
      action: int8 [].
      log_prob: [], under the behaviour policy, its exploration aside.
      reward: [], of its segment.
      next_inputs: [F], after the step.
      ended: bool [], the run ended here: nothing follows.
    """

    inputs: jax.Array
    action: jax.Array
    log_prob: jax.Array
    reward: jax.Array
    next_inputs: jax.Array
    ended: jax.Array


class Buffer(NamedTuple):
    """A ring of transitions.

    Attributes:
      content: `Transition` with a leading axis of its size.
      pushed: int32 [], transitions so far.
    """

    content: Transition
    pushed: jax.Array


def push(buffer: Buffer, transitions: Transition, live: jax.Array) -> Buffer:
    """Writes those of T transitions that are live over the oldest ones."""
    size = buffer.content.reward.shape[0]
    at = buffer.pushed + jnp.cumsum(live) - 1
    at = jnp.where(live, at % size, size)  # beyond the end is dropped
    content = jax.tree.map(
        lambda ring, new: ring.at[at].set(new, mode="drop"), buffer.content, transitions
    )
    pushed = buffer.pushed + jnp.sum(live, dtype=buffer.pushed.dtype)
    return Buffer(content, pushed)


def one_step_targets(
    value: Callable[[Phi, jax.Array], jax.Array],
    phi: Phi,
    transitions: Transition,
    discount: Any,
) -> tuple[jax.Array, jax.Array]:
    """target = r + γ V(x'), V(x') = 0 behind the end; advantage = target - V(x)."""
    following = jnp.where(transitions.ended, 0, value(phi, transitions.next_inputs))
    targets = transitions.reward + discount * following
    return targets, targets - value(phi, transitions.inputs)


def _log_prob(logits: jax.Array, actions: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits)
    chosen = actions.astype(jnp.int32)[..., None]
    return jnp.take_along_axis(log_probs, chosen, axis=-1)[..., 0]


def _spread(advantage: Any, live: jax.Array) -> jax.Array:
    """[], [S] or [S, T] to the shape of the steps: an axis of runs comes first."""
    advantage = jnp.asarray(advantage)
    missing = live.ndim - advantage.ndim
    return jnp.broadcast_to(
        advantage.reshape(advantage.shape + (1,) * missing), live.shape
    )


def _check_steps(
    function: str, phi: Phi, controller: Controller, trajectory: Any, advantage: Any
) -> None:
    """Looks at trees and shapes alone."""
    what = "a `Trajectory`"
    check_has(function, "trajectory", trajectory, what, "inputs", "actions", "live")
    width = jnp.shape(trajectory.inputs)[-1]
    wanted = jax.eval_shape(lambda: controller.init(jax.random.key(0), width))
    if jax.tree.structure(phi) != jax.tree.structure(wanted):
        rule = f"must be parameters of the controller, {jax.tree.structure(wanted)}"
        refuse(function, "phi", rule, jax.tree.structure(phi))
    steps, given = jnp.shape(trajectory.live), jnp.shape(advantage)
    if given not in ((), steps[:-1], steps):
        rule = f"must be a scalar, one a run {steps[:-1]} or one a step {steps}"
        refuse(function, "advantage", rule, f"shape {given}")


def _check_shape(function: str, name: str, value: Any, trajectory: Trajectory) -> None:
    steps = jnp.shape(trajectory.live)
    if jnp.shape(value) != steps:
        rule = f"must have the shape of the steps, {steps}"
        refuse(function, name, rule, f"shape {jnp.shape(value)}")
