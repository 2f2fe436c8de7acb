"""The online form: a run that goes on, and PPO on segments of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_count, check_number
from metax.autoloss.controllers import Controller, bind
from metax.autoloss.decisions import Decision, Policy
from metax.autoloss.dispatching import keep
from metax.autoloss.episodes import Episode, Record, RunState, episode
from metax.autoloss.learning import Learner, begin, descend, note_best, start_anew
from metax.autoloss.policy_gradient import (
    Buffer,
    Transition,
    entropy,
    one_step_targets,
    ppo_loss,
    push,
)
from metax.autoloss.rewards import SegmentReward, segment
from metax.autoloss.rollouts import Trajectory
from metax.autoloss.states import AutoLossInfo, AutoLossState, OnlineState
from metax.base import Loop, check_key

__all__ = ["PPO", "online"]


class PPO(NamedTuple):
    """How a controller learns online.

    Attributes:
      segment_length: decisions between two updates; must divide `num_steps`.
      segment_reward: what they are worth; see `segment`.
      discount: γ, in [0, 1].
      clip: of the ratio, above 0.
      value_coefficient: weight of the critic's loss.
      buffer_size: transitions that are kept, at least `segment_length`.
      batch_size: transitions of a minibatch.
      num_updates: minibatches after a segment.
      sync_every: updates of φ after which the policy that acts, and the critic that
        targets come from, take it over.
      epsilon: in [0, 1], how often an action is drawn uniformly instead; a number, or
        an optax schedule over runs. The ratio ignores it.
    """

    segment_length: int = 20
    segment_reward: SegmentReward = segment()
    discount: Any = 0.95
    clip: Any = 0.2
    value_coefficient: Any = 0.5
    buffer_size: int = 2000
    batch_size: int = 64
    num_updates: int = 10
    sync_every: int = 10
    epsilon: optax.Schedule | Any = 0.0


def online(learner: Learner, ppo: PPO) -> Loop:
    """The loop of `autoloss(estimator="ppo")`."""
    _check(learner, ppo)
    epsilon_of = ppo.epsilon if callable(ppo.epsilon) else lambda _: ppo.epsilon

    def run_of(phi: Any, feature_state: Any, epsilon: Any) -> Episode:
        policy = bind(learner.controller, phi, learner.features, feature_state)
        return episode(
            learner.problem,
            _exploring(learner.controller, phi, policy, epsilon),
            num_steps=learner.num_steps,
            dispatch=learner.dispatch,
            early_stopping=learner.early_stopping,
            restart=learner.restart,
        )

    def init(key: jax.Array) -> AutoLossState:
        key_phi, key_run = jax.random.split(key)
        state = begin(learner, key_phi)
        run = run_of(state.phi, state.feature_state, 0.0).start(key_run)
        size = (ppo.buffer_size,)
        x, zeros = run.policy_state.inputs, jnp.zeros(size)
        content = Transition(
            inputs=jnp.zeros(size + x.shape, x.dtype),
            action=jnp.zeros(size, jnp.int8),
            log_prob=zeros,
            reward=zeros,
            next_inputs=jnp.zeros(size + x.shape, x.dtype),
            ended=jnp.zeros(size, bool),
        )
        return state._replace(
            online=OnlineState(
                run=run,
                segments=ppo.segment_reward.init(),
                buffer=Buffer(content, jnp.int32(0)),
                behaviour=state.phi,
                episodes=jnp.int32(1),
            )
        )

    def renew(state: AutoLossState, key: jax.Array) -> OnlineState:
        """A new run, if the last one is over."""
        now = state.online
        over = now.run.done | (now.run.step >= learner.num_steps)
        run, segments = jax.lax.cond(
            over,
            lambda: (
                run_of(now.behaviour, state.feature_state, 0.0).start(key),
                ppo.segment_reward.init(),
            ),
            lambda: (now.run, now.segments),
        )
        return now._replace(
            run=run, segments=segments, episodes=now.episodes + over.astype(jnp.int32)
        )

    def play(
        now: OnlineState, feature_state: Any, key: jax.Array, data: Any
    ) -> tuple[RunState, Record]:
        """One segment."""
        key_prime, key_steps = jax.random.split(key)
        epsilon = epsilon_of(now.episodes - 1)
        one = run_of(now.behaviour, feature_state, epsilon)
        run = jax.lax.cond(
            now.run.step == 0,
            lambda: one.prime(now.run, key_prime, data),
            lambda: now.run,
        )

        def advance(run: RunState, key: jax.Array) -> tuple[RunState, Record]:
            key_act, key_batch = jax.random.split(key)
            return one.advance(run, key_act, key_batch, data, None)

        keys = jax.random.split(key_steps, ppo.segment_length)
        return jax.lax.scan(advance, run, keys)

    def judge(
        now: OnlineState, run: RunState, updates: jax.Array, data: Any
    ) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """The segment's reward, as it is and as it is learned from."""
        seen = run.observation
        value = jax.lax.cond(
            seen.metric_refreshed,
            lambda: seen.metric,
            lambda: learner.problem.metric(run.params, data).astype(seen.metric.dtype),
        )
        maximize = learner.problem.maximize
        segments, reward = ppo.segment_reward.update(now.segments, value, maximize)
        reward = jnp.where(jnp.isfinite(reward), reward, 0)
        scale = jnp.asarray(learner.reward_scale(updates), reward.dtype)
        learned = scale * reward
        if learner.restart is not None:
            failed = run.restarted | ~run.is_finite
            learned = jnp.where(failed, learner.restart.penalty, learned)
        return segments, reward, learned, scale

    def step(
        state: AutoLossState, key: jax.Array, data: Any
    ) -> tuple[AutoLossState, AutoLossInfo]:
        check_key(key, "autoloss(...).step(key=...)")
        key_run, key_play, key_learn, key_new = jax.random.split(key, 4)
        now = renew(state, key_run)
        run, records = play(now, state.feature_state, key_play, data)
        segments, reward, learned, scale = judge(now, run, state.num_updates, data)
        state = note_best(learner, state, now.behaviour, run.best_metric)
        state = start_anew(learner, state, key_new, run.restarted)

        new = _transitions(learner, run, records, learned)
        buffer = push(now.buffer, new, records.live)
        keys = jax.random.split(key_learn, ppo.num_updates)
        carry = (state.phi, state.meta_state)
        carry, (losses, norms) = jax.lax.scan(
            lambda carry, key: _learn(learner, ppo, now.behaviour, buffer, carry, key),
            carry,
            keys,
        )
        phi, meta_state = carry
        updates = state.num_updates + ppo.num_updates
        due = updates // ppo.sync_every > state.num_updates // ppo.sync_every
        _, gain = one_step_targets(_critic(learner), phi, new, ppo.discount)
        live = jnp.maximum(jnp.sum(records.live), 1)
        mean = lambda x: jnp.sum(jnp.where(records.live, x, 0)) / live
        taken = jax.nn.one_hot(new.action, len(learner.problem.actions))
        info = AutoLossInfo(
            reward=reward[None],
            best_metric=run.best_metric[None],
            advantage=mean(gain)[None],
            num_steps=run.step[None],
            action_fraction=(records.live @ taken / live)[None],
            entropy=mean(entropy(learner.controller.logits(phi, new.inputs))),
            loss=jnp.mean(losses),
            gradient_norm=jnp.mean(norms),
            baseline=state.baseline,
            reward_scale=scale,
            restarted=run.restarted[None],
            is_finite=(run.is_finite & jnp.all(jnp.isfinite(norms)))[None],
        )
        after = state._replace(
            phi=phi,
            meta_state=meta_state,
            feature_state=run.policy_state.features,
            num_updates=updates,
            online=OnlineState(
                run=run,
                segments=segments,
                buffer=buffer,
                behaviour=keep(due | run.restarted, phi, now.behaviour),
                episodes=now.episodes,
            ),
        )
        return after, info

    return Loop(init, step)


def _learn(
    learner: Learner,
    ppo: PPO,
    target: Any,
    buffer: Buffer,
    carry: tuple[Any, Any],
    key: jax.Array,
) -> tuple[tuple[Any, Any], tuple[jax.Array, jax.Array]]:
    """One minibatch, drawn with replacement from what the ring holds."""
    phi, meta_state = carry
    filled = jnp.minimum(buffer.pushed, ppo.buffer_size)
    drawn = jax.random.randint(key, (ppo.batch_size,), 0, jnp.maximum(filled, 1))
    batch = jax.tree.map(lambda ring: ring[drawn], buffer.content)
    targets, _ = one_step_targets(_critic(learner), target, batch, ppo.discount)
    advantage = targets - _critic(learner)(phi, batch.inputs)
    trajectory = Trajectory(
        inputs=batch.inputs,
        actions=batch.action,
        log_probs=batch.log_prob,
        rewards=batch.reward,
        live=jnp.ones(ppo.batch_size, bool),
    )
    phi, meta_state, loss, norm = descend(
        learner,
        phi,
        meta_state,
        lambda phi: ppo_loss(
            phi,
            learner.controller,
            trajectory,
            advantage,
            targets,
            clip=ppo.clip,
            entropy_coefficient=learner.entropy_coefficient,
            value_coefficient=ppo.value_coefficient,
        ),
    )
    return (phi, meta_state), (loss, norm)


def _transitions(
    learner: Learner, run: RunState, records: Record, reward: jax.Array
) -> Transition:
    inputs, live = records.decision.inputs, records.live
    following = jnp.concatenate([inputs[1:], run.policy_state.inputs[None]])
    over = run.done | (run.step >= learner.num_steps)
    last = jnp.arange(live.size) == jnp.sum(live) - 1
    return Transition(
        inputs=inputs,
        action=records.decision.action.astype(jnp.int8),
        log_prob=records.decision.log_prob,
        reward=jnp.broadcast_to(reward, live.shape),
        next_inputs=following,
        ended=last & over,
    )


def _exploring(
    controller: Controller, phi: Any, policy: Policy, epsilon: Any
) -> Policy:
    """Draws an action uniformly with probability ε; log π stays the controller's."""

    def act(state: Any, key: jax.Array) -> tuple[Any, Decision]:
        key_own, key_try, key_any = jax.random.split(key, 3)
        state, decision = policy.act(state, key_own)
        tries = jax.random.uniform(key_try) < epsilon
        anything = jax.random.randint(key_any, (), 0, controller.spec.num_actions)
        action = jnp.where(tries, anything, decision.action).astype(jnp.int32)
        log_probs = jax.nn.log_softmax(controller.logits(phi, decision.inputs))
        return state, decision._replace(action=action, log_prob=log_probs[action])

    return policy._replace(act=act, draw=None)


def _critic(learner: Learner) -> Any:
    return learner.controller.value


def _check(learner: Learner, ppo: PPO) -> None:
    if learner.controller.value is None:
        raise ValueError(
            '`autoloss(estimator="ppo")` needs a controller with a critic; got one '
            "without. Make it by `controller(..., critic_hidden=(32,))`."
        )
    lengths = {
        "segment_length": ppo.segment_length,
        "batch_size": ppo.batch_size,
        "num_updates": ppo.num_updates,
        "sync_every": ppo.sync_every,
    }
    check_count("PPO", 1, **lengths)
    check_count("PPO", ppo.segment_length, buffer_size=ppo.buffer_size)
    check_number("PPO", "discount", ppo.discount, least=0)
    check_number("PPO", "clip", ppo.clip, above=0)
    check_number("PPO", "value_coefficient", ppo.value_coefficient, least=0)
    if not callable(ppo.epsilon):
        check_number("PPO", "epsilon", ppo.epsilon, least=0)
    if learner.num_steps % ppo.segment_length:
        raise ValueError(
            "`autoloss(num_steps=...)` must be a multiple of `ppo.segment_length`; got "
            f"num_steps={learner.num_steps}, segment_length={ppo.segment_length}."
        )
