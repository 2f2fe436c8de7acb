"""A run of an alternating problem led by a policy: its state, and one step of it.

The order of a step is act, update, refresh, observe. A check of the metric belongs to
the step it follows; whether there is one is known when the program is written, so that
nothing is measured in vain inside a vmapped scan.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.autoloss.decisions import Decision, Observation, Policy
from metax.autoloss.dispatching import (
    Measured,
    Stepped,
    follow,
    init_optimizers,
    keep,
    measure_all,
    take_step,
    zero_gradients,
)
from metax.base import AlternatingProblem

__all__ = ["Episode", "Record", "RunState", "episode", "improves"]


class RunState(NamedTuple):
    """A run under way.

    Attributes:
      params: the groups.
      optimizer_states: by group, or by the index of an action.
      policy_state: of the policy.
      observation: what the policy saw last, without `aux` and `extras`.
      gradients: of each loss at `params`, where they are carried from step to step,
        else ().
      best_params: at the best check; the first ones before it.
      best_metric: [], the moving average of the metric there; infinite before.
      best_step: int32 [], decisions taken until then.
      smoothed: [], the moving average of the metric.
      waited: int32 [], checks since the best one.
      step: int32 [], decisions taken.
      taken: int32 [], optimizer steps taken over all groups.
      action_counts: int32 [Q].
      reward_state: of the step reward, or ().
      restart_state: of the restart rule, or ().
      done: bool [], the run is over: out of patience, restarted or not finite.
      restarted: bool [].
      is_finite: bool [].
    """

    params: dict[str, Any]
    optimizer_states: dict[Any, Any]
    policy_state: Any
    observation: Observation
    gradients: Any
    best_params: dict[str, Any]
    best_metric: jax.Array
    best_step: jax.Array
    smoothed: jax.Array
    waited: jax.Array
    step: jax.Array
    taken: jax.Array
    action_counts: jax.Array
    reward_state: Any
    restart_state: Any
    done: jax.Array
    restarted: jax.Array
    is_finite: jax.Array


class Record(NamedTuple):
    """What a step leaves behind.

    Attributes:
      decision: what was decided.
      reward: [], the step reward, 0 without one.
      live: bool [], False where the run was over before.
      checked: [], the moving average of the metric where the step was checked, else
        NaN.
    """

    decision: Decision
    reward: jax.Array
    live: jax.Array
    checked: jax.Array


class Episode(NamedTuple):
    """Pure functions of a run, and how often it looks at the metric.

    Attributes:
      start: `start(key) -> state`; needs no data.
      prime: `prime(state, key, data) -> state`, before the first step: measures the
        gradients that are carried.
      advance: `advance(state, key_act, key_batch, data, look) -> (state, record)`.
        `look` says whether this is a step at which the metric may be due: True, False,
        or None where that is to be found out from the state, by `lax.cond`.
      period: steps between two looks.
      validate_every: steps between two checks, a multiple of `period`.
    """

    start: Callable[[jax.Array], RunState]
    prime: Callable[[RunState, jax.Array, Any], RunState]
    advance: Callable[..., tuple[RunState, Record]]
    period: int
    validate_every: int


class _Rules(NamedTuple):
    """What does not change in a run."""

    problem: AlternatingProblem
    policy: Policy
    num_steps: int
    dispatch: str
    validate_every: int
    observe_every: int
    patience: int | None
    step_reward: Any
    restart: Any
    carries: bool


def episode(
    problem: AlternatingProblem,
    policy: Policy,
    *,
    num_steps: int,
    dispatch: str,
    validate_every: int | None = None,
    early_stopping: bool = True,
    step_reward: Any = None,
    restart: Any = None,
) -> Episode:
    """The functions of a run; the arguments are those of `rollout`.

    With `refresh="all"` on a problem whose batch never changes, the gradients measured
    after a step are those of the next one, and are carried. Of another batch they would
    be other gradients.
    """
    validate_every = validate_every or problem.validate_every
    once = all(action.repeats == 1 for action in problem.actions)
    rules = _Rules(
        problem=problem,
        policy=policy,
        num_steps=num_steps,
        dispatch=dispatch,
        validate_every=validate_every,
        observe_every=policy.observe_every or validate_every,
        patience=problem.patience if early_stopping else None,
        step_reward=step_reward,
        restart=restart,
        carries=policy.refresh == "all" and problem.full_batch and once,
    )

    def start(key: jax.Array) -> RunState:
        return _start(rules, key)

    def prime(state: RunState, key: jax.Array, data: Any) -> RunState:
        if not rules.carries:
            return state
        measured, gradients = measure_all(problem, state.params, key, data)
        observation = state.observation._replace(
            losses=measured.losses, gradient_rms=measured.gradient_rms
        )
        return state._replace(gradients=gradients, observation=observation)

    def advance(
        state: RunState,
        key_act: jax.Array,
        key_batch: jax.Array,
        data: Any,
        look: bool | None,
    ) -> tuple[RunState, Record]:
        return _advance(rules, state, key_act, key_batch, data, look)

    # a run that is shorter than the period must not be padded to its length
    period = min(math.gcd(rules.observe_every, validate_every), num_steps)
    return Episode(start, prime, advance, period, validate_every)


def improves(problem: AlternatingProblem, new: jax.Array, old: jax.Array) -> jax.Array:
    """Whether a metric is strictly better than another."""
    return new > old if problem.maximize else new < old


def _start(rules: _Rules, key: jax.Array) -> RunState:
    problem = rules.problem
    params = problem.init(key)
    zero, no = jnp.int32(0), jnp.bool_(False)
    worst = -jnp.inf if problem.maximize else jnp.inf
    losses = jnp.zeros(len(problem.losses))
    return RunState(
        params=params,
        optimizer_states=init_optimizers(problem, params),
        policy_state=rules.policy.init(),
        observation=Observation(
            step=zero,
            num_steps=jnp.int32(rules.num_steps),
            action=jnp.int32(-1),
            losses=losses,
            gradient_rms=losses,
            refreshed=losses != 0,
            metric=jnp.zeros(()),
            metric_refreshed=no,
            aux={},
            extras={},
        ),
        gradients=zero_gradients(problem, params) if rules.carries else (),
        best_params=params,
        best_metric=jnp.full((), worst, losses.dtype),
        best_step=zero,
        smoothed=jnp.zeros(()),
        waited=zero,
        step=zero,
        taken=zero,
        action_counts=jnp.zeros(len(problem.actions), jnp.int32),
        reward_state=() if rules.step_reward is None else rules.step_reward.init(),
        restart_state=() if rules.restart is None else rules.restart.init(),
        done=no,
        restarted=no,
        is_finite=~no,
    )


def _advance(
    rules: _Rules,
    state: RunState,
    key_act: jax.Array,
    key_batch: jax.Array,
    data: Any,
    look: bool | None,
) -> tuple[RunState, Record]:
    live = ~state.done & (state.step < rules.num_steps)
    every = jnp.arange(len(rules.problem.actions))
    policy_state, decision = rules.policy.act(state.policy_state, key_act)
    stepped, measured, gradients = _update(rules, state, decision, key_batch, data)
    metric, extras, is_seen = _look(rules, state, stepped, key_batch, data, look)
    observation = _observation(state, decision, measured, metric, extras, is_seen)

    reward, reward_state = jnp.zeros(()), state.reward_state
    if rules.step_reward is not None:
        reward_state, reward = rules.step_reward.update(reward_state, observation)
    fired, restart_state = jnp.bool_(False), state.restart_state
    if rules.restart is not None:
        restart_state, fired = rules.restart.update(restart_state, observation)

    is_finite = stepped.is_finite & (jnp.isfinite(metric) | ~is_seen)
    is_finite &= jnp.all(jnp.isfinite(measured.losses))
    after = state._replace(
        params=stepped.params,
        optimizer_states=stepped.states,
        policy_state=rules.policy.observe(policy_state, observation),
        # what depends on the data in its form cannot be kept: `init` sees no data
        observation=observation._replace(aux={}, extras={}),
        gradients=gradients,
        step=observation.step,
        taken=stepped.taken,
        action_counts=state.action_counts + (every == decision.action),
        reward_state=reward_state,
        restart_state=restart_state,
        restarted=fired,
        is_finite=is_finite,
    )
    is_check = is_seen & is_finite & (after.step % rules.validate_every == 0)
    after = _judge(rules, after, is_check) if look is not False else after
    after = after._replace(done=after.done | fired | ~is_finite)
    record = Record(
        decision=decision,
        reward=jnp.where(live, reward, 0),
        live=live,
        checked=jnp.where(live & is_check, after.smoothed, jnp.nan),
    )
    return keep(live, after, state), record


def _update(
    rules: _Rules, state: RunState, decision: Decision, key: jax.Array, data: Any
) -> tuple[Stepped, Measured, Any]:
    """The optimizer steps, what is known of the losses then, and what is carried."""
    problem, seen = rules.problem, state.observation
    known = Measured(seen.losses, seen.gradient_rms, seen.refreshed, {})
    before = Stepped(
        state.params, state.optimizer_states, state.taken, known, state.is_finite
    )
    if rules.carries:
        stepped = follow(problem, before, decision, state.gradients)
    else:
        stepped = take_step(problem, rules.dispatch, before, decision, key, data)
    if rules.policy.refresh != "all":
        return stepped, stepped.measured, ()
    measured, gradients = measure_all(problem, stepped.params, key, data)
    return stepped, measured, gradients if rules.carries else ()


def _look(
    rules: _Rules,
    state: RunState,
    stepped: Stepped,
    key: jax.Array,
    data: Any,
    look: bool | None,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """The metric and what is seen beside it, and whether they were due."""
    problem, step = rules.problem, state.step + 1
    due = step % rules.observe_every == 0
    due |= step % rules.validate_every == 0

    def measure() -> tuple[jax.Array, dict[str, jax.Array]]:
        metric = jnp.asarray(problem.metric(stepped.params, data), state.smoothed.dtype)
        if problem.observe is None:
            return metric, {}
        key_sample, _ = jax.random.split(key)
        batch = problem.sample(data, key_sample)
        return metric, dict(problem.observe(stepped.params, batch, data))

    def pass_by() -> tuple[jax.Array, dict[str, jax.Array]]:
        shapes = jax.eval_shape(measure)[1]
        zeros = {n: jnp.zeros(s.shape, s.dtype) for n, s in shapes.items()}
        return state.observation.metric, zeros

    if look is False:
        return *pass_by(), jnp.bool_(False)
    if look:
        return *measure(), due
    return *jax.lax.cond(due, measure, pass_by), due


def _observation(
    state: RunState,
    decision: Decision,
    measured: Measured,
    metric: jax.Array,
    extras: dict[str, jax.Array],
    is_seen: jax.Array,
) -> Observation:
    old = state.observation
    fresh = lambda new, cached: jnp.where(measured.measured, new, cached)
    return Observation(
        step=state.step + 1,
        num_steps=old.num_steps,
        action=jnp.asarray(decision.action, jnp.int32),
        losses=fresh(measured.losses, old.losses),
        gradient_rms=fresh(measured.gradient_rms, old.gradient_rms),
        refreshed=measured.measured,
        metric=jnp.where(is_seen, metric, old.metric),
        metric_refreshed=is_seen,
        aux=measured.aux,
        extras=extras,
    )


def _judge(rules: _Rules, state: RunState, is_check: jax.Array) -> RunState:
    """Takes note of a check: the best parameters, and the patience that is left."""
    decay, metric = rules.problem.metric_decay, state.observation.metric
    first = state.step <= rules.validate_every
    smoothed = jnp.where(first, metric, decay * state.smoothed + (1 - decay) * metric)
    better = is_check & improves(rules.problem, smoothed, state.best_metric)
    waited = jnp.where(better, 0, state.waited + is_check)
    over = state.done
    if rules.patience is not None:
        over |= waited > rules.patience
    return state._replace(
        best_params=keep(better, state.params, state.best_params),
        best_metric=jnp.where(better, smoothed, state.best_metric),
        best_step=jnp.where(better, state.step, state.best_step),
        smoothed=jnp.where(is_check, smoothed, state.smoothed),
        waited=waited,
        done=over,
    )
