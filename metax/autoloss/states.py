"""What the loops of this package carry and show."""

from typing import Any, NamedTuple

import jax

from metax.autoloss.episodes import RunState
from metax.autoloss.policy_gradient import Buffer

__all__ = [
    "AutoLossInfo",
    "AutoLossState",
    "GuideInfo",
    "GuideState",
    "OnlineState",
]

Phi = Any

# A guided run carries what every run does; its keys come from outside.
GuideState = RunState


class OnlineState(NamedTuple):
    """What PPO carries beside the controller: a run that goes on from step to step.

    Attributes:
      run: of the task.
      segments: of the segment reward.
      buffer: transitions.
      behaviour: φ of the policy that acts and of the targets, synchronised when due.
      episodes: int32 [], runs that have begun.
    """

    run: RunState
    segments: Any
    buffer: Buffer
    behaviour: Phi
    episodes: jax.Array


class AutoLossState(NamedTuple):
    """What the next update of a controller needs.

    Attributes:
      phi: the controller's parameters φ.
      meta_state: of the meta-optimizer.
      feature_state: statistics of the features.
      baseline: [], B.
      num_updates: int32 [], updates of φ so far.
      best_phi: the φ that led the best run.
      best_metric: [], the metric of that run; infinite before the first.
      online: an `OnlineState` with PPO, else ().
    """

    phi: Phi
    meta_state: Any
    feature_state: Any
    baseline: jax.Array
    num_updates: jax.Array
    best_phi: Phi
    best_metric: jax.Array
    online: Any


class AutoLossInfo(NamedTuple):
    """What there is to see of one update; S runs, 1 with PPO; Q actions.

    Attributes:
      reward: [S], as the problem gives it, before `reward_scale`; the segment's with
        PPO.
      best_metric: [S], of each run so far.
      advantage: [S], as it entered the loss; with PPO the mean over the segment.
      num_steps: int32 [S], live steps of each run so far.
      action_fraction: [S, Q].
      entropy: [], of the policy, mean over live steps, in nats.
      loss: [].
      gradient_norm: [], Euclidean norm over φ.
      baseline: [], after the update.
      reward_scale: [].
      restarted: bool [S].
      is_finite: bool [S], whether each run was. One that was not has not spoilt the
        update: `train(..., check_finite=False)` goes on.
    """

    reward: jax.Array
    best_metric: jax.Array
    advantage: jax.Array
    num_steps: jax.Array
    action_fraction: jax.Array
    entropy: jax.Array
    loss: jax.Array
    gradient_norm: jax.Array
    baseline: jax.Array
    reward_scale: jax.Array
    restarted: jax.Array
    is_finite: jax.Array


class GuideInfo(NamedTuple):
    """What there is to see of one decision; M losses.

    Attributes:
      action: int32 [].
      losses: [M], as the policy saw them.
      metric: [], at its last refresh.
      metric_refreshed: bool [], whether that was this step.
      is_finite: bool [].
    """

    action: jax.Array
    losses: jax.Array
    metric: jax.Array
    metric_refreshed: jax.Array
    is_finite: jax.Array
