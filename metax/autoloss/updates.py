"""The offline form: whole runs, then one policy gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from metax.autoloss.controllers import bind
from metax.autoloss.learning import Learner, begin, descend, note_best, start_anew
from metax.autoloss.policy_gradient import (
    advantages,
    clip_advantage,
    entropy,
    reinforce_loss,
)
from metax.autoloss.rewards import StepReward
from metax.autoloss.rollouts import EpisodeResult, Trajectory, rollouts
from metax.autoloss.states import AutoLossInfo, AutoLossState
from metax.base import Loop, check_key

__all__ = ["offline"]


def offline(
    learner: Learner,
    *,
    num_rollouts: int,
    baseline_decay: Any,
    advantage: str,
    advantage_clip: Any,
    step_reward: StepReward | None,
    reduction: Any,
    baseline_order: str,
    common_random_numbers: bool,
    chunk: int,
) -> Loop:
    """The loop of `autoloss(estimator="reinforce")`, whose arguments these are."""

    def run(
        state: AutoLossState, key: jax.Array, data: Any
    ) -> tuple[EpisodeResult, Trajectory]:
        key_runs, key_task = jax.random.split(key)
        return rollouts(
            learner.problem,
            bind(learner.controller, state.phi, learner.features, state.feature_state),
            jax.random.split(key_runs, num_rollouts),
            data,
            learner.num_steps,
            dispatch=learner.dispatch,
            step_reward=step_reward,
            restart=learner.restart,
            early_stopping=learner.early_stopping,
            task_key=key_task if common_random_numbers else None,
            chunk=chunk,
        )

    def weigh(
        state: AutoLossState, results: EpisodeResult
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The advantages, the new baseline, and the scale of the rewards."""
        scale = jnp.asarray(
            learner.reward_scale(state.num_updates), results.reward.dtype
        )
        weights, baseline = advantages(
            scale * _finite_rewards(results),
            state.baseline,
            kind=advantage,
            baseline_decay=baseline_decay,
            baseline_order=baseline_order,
            is_first=state.num_updates == 0,
        )
        weights = clip_advantage(weights, advantage_clip)
        if learner.restart is not None:
            failed = results.restarted | ~results.is_finite
            weights = jnp.where(failed, learner.restart.penalty, weights)
        return weights, baseline, scale

    def step(
        state: AutoLossState, key: jax.Array, data: Any
    ) -> tuple[AutoLossState, AutoLossInfo]:
        check_key(key, "autoloss(...).step(key=...)")
        key_run, key_new = jax.random.split(key)
        results, trajectory = run(state, key_run, data)
        weights, baseline, scale = weigh(state, results)
        best = jnp.max if learner.problem.maximize else jnp.min
        state = note_best(learner, state, state.phi, best(results.best_metric))
        state = start_anew(learner, state, key_new, jnp.any(results.restarted))

        phi, meta_state, loss, norm = descend(
            learner,
            state.phi,
            state.meta_state,
            lambda phi: reinforce_loss(
                phi,
                learner.controller,
                trajectory,
                weights,
                entropy_coefficient=learner.entropy_coefficient,
                reduction=reduction,
            ),
        )
        spread = entropy(learner.controller.logits(state.phi, trajectory.inputs))
        live = trajectory.live
        counts = results.action_counts / jnp.maximum(results.num_steps, 1)[:, None]
        info = AutoLossInfo(
            reward=results.reward,
            best_metric=results.best_metric,
            advantage=weights,
            num_steps=results.num_steps,
            action_fraction=counts,
            entropy=jnp.sum(jnp.where(live, spread, 0)) / jnp.maximum(live.sum(), 1),
            loss=loss,
            gradient_norm=norm,
            baseline=baseline,
            reward_scale=scale,
            restarted=results.restarted,
            is_finite=results.is_finite & jnp.isfinite(norm),
        )
        after = AutoLossState(
            phi=phi,
            meta_state=meta_state,
            feature_state=learner.features.merge(
                state.feature_state, results.policy_state.features
            ),
            baseline=baseline,
            num_updates=state.num_updates + 1,
            best_phi=state.best_phi,
            best_metric=state.best_metric,
            online=(),
        )
        return after, info

    return Loop(lambda key: begin(learner, key), step)


def _finite_rewards(results: EpisodeResult) -> jax.Array:
    """Those of runs that ceased to be finite as low as the lowest of the others."""
    fine = results.is_finite & jnp.isfinite(results.reward)
    least = jnp.min(jnp.where(fine, results.reward, jnp.inf))
    least = jnp.where(jnp.isfinite(least), least, 0)
    return jnp.where(fine, results.reward, least)
