"""Whole runs of an alternating problem, each one program.

A run is a `while_loop` over chunks of steps, which ends when the run does, and a scan
inside a chunk. Several runs are batched inside the loop's body, so that the loop ends
by one scalar, "is any of them alive": a batched predicate would select over all that is
carried, the record of the run included, at every turn.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.autoloss.decisions import Policy
from metax.autoloss.dispatching import keep
from metax.autoloss.doors import check_rollout, check_rules
from metax.autoloss.episodes import Record, RunState, episode
from metax.autoloss.restarts import Restart
from metax.autoloss.rewards import StepReward
from metax.base import AlternatingProblem, check_key

__all__ = ["EpisodeResult", "Trajectory", "rollout", "rollouts"]


class Trajectory(NamedTuple):
    """The decisions of a run of T steps.

    Attributes:
      inputs: [T, F], what they were based on.
      actions: int8 [T].
      log_probs: [T], under the policy that took them.
      rewards: [T], the step rewards; 0 without them.
      live: bool [T], False after the run ended.
    """

    inputs: jax.Array
    actions: jax.Array
    log_probs: jax.Array
    rewards: jax.Array
    live: jax.Array


class EpisodeResult(NamedTuple):
    """How a run ended; K checks of the metric, Q actions.

    Attributes:
      params: at the last live step.
      optimizer_states: by group, or by the index of an action.
      best_params: at the best check; the last ones where there was no check.
      best_metric: [], the (moving average of the) metric there; infinite without one.
      best_step: int32 [].
      metrics: [K], at each check; NaN where not reached.
      metrics_live: bool [K].
      reward: [], by `AlternatingProblem.reward`; NaN where K = 0.
      num_steps: int32 [], live steps.
      action_counts: int32 [Q].
      policy_state: with the feature statistics, for example.
      restarted: bool [], a restart rule ended it.
      is_finite: bool []. A step that was not finite has ended the run.
    """

    params: dict[str, Any]
    optimizer_states: dict[Any, Any]
    best_params: dict[str, Any]
    best_metric: jax.Array
    best_step: jax.Array
    metrics: jax.Array
    metrics_live: jax.Array
    reward: jax.Array
    num_steps: jax.Array
    action_counts: jax.Array
    policy_state: Any
    restarted: jax.Array
    is_finite: jax.Array


def rollout(
    problem: AlternatingProblem,
    policy: Policy,
    key: jax.Array,
    data: Any,
    num_steps: int,
    *,
    dispatch: Literal["mix", "switch"] = "mix",
    step_reward: StepReward | None = None,
    restart: Restart | None = None,
    validate_every: int | None = None,
    early_stopping: bool = True,
    task_key: jax.Array | None = None,
    chunk: int = 500,
) -> tuple[EpisodeResult, Trajectory]:
    """Runs an alternating problem from its initialisation, led by a policy.

    Step t draws from `fold_in(key, t)`: the same key gives the same run bit for bit.
    One program whatever the policy decides. Cost a step: with "mix" one backward pass
    through all losses, with "switch" that of the chosen one; what `policy.refresh` asks
    for; the metric every `policy.observe_every` steps. Memory: the parameters three
    times, the optimizers' states, and the trajectory, 4 (F + 2) + 2 bytes a step.

    Args:
      problem: what is run.
      policy: what decides; for training a controller see `autoloss`.
      key: of everything random.
      data: handed to `sample`, `metric` and `observe`.
      num_steps: T, decisions at most; at least 1.
      dispatch: "mix" where runs are vmapped and losses share their work, as named by
        `AlternatingProblem.shared`; "switch" for single large runs.
      step_reward: see `improvement`; None for none.
      restart: ends the run when it fires; None for never.
      validate_every: steps between checks; None for the problem's.
      early_stopping: end when the problem's patience is exceeded.
      task_key: initialisation and batches come from it instead of `key`, so that runs
        by different policies can share them.
      chunk: steps between two looks whether the run is over.

    Returns:
      How it ended, and what was decided.

    Raises:
      ValueError: an action names a loss or group that does not exist, optimizers do not
        fit the groups, the reward's direction is not the metric's, "mix" meets actions
        that repeat differently, or a number is out of range.

    Example:
      >>> import jax, optax
      >>> from metax import Action, AlternatingProblem
      >>> from metax.autoloss import cycle, rollout
      >>> problem = AlternatingProblem(
      ...     init=lambda key: {"x": jax.numpy.array(3.0)},
      ...     losses=(lambda p, b, k: (p["x"] - b) ** 2, lambda p, b, k: p["x"] ** 2),
      ...     actions=(Action(0), Action(1)),
      ...     optimizers=optax.sgd(0.25),
      ...     sample=lambda data, key: data,
      ...     metric=lambda params, data: (params["x"] - data) ** 2,
      ...     reward=lambda history, live: -history[-1],
      ... )
      >>> result, _ = rollout(problem, cycle((2, 1)), jax.random.key(0), 1.0, 20)
      >>> result.action_counts.tolist(), round(float(result.params["x"]), 3)
      ([14, 6], 0.857)
    """
    check_key(key, "rollout(key=...)")
    check_rollout(problem, "rollout", num_steps, dispatch, validate_every, chunk)
    check_rules("rollout", policy, step_reward, restart, task_key)
    problem, data = _prepared(problem, data)
    plan = _plan(
        problem,
        policy,
        num_steps,
        chunk,
        dispatch=dispatch,
        validate_every=validate_every,
        early_stopping=early_stopping,
        step_reward=step_reward,
        restart=restart,
    )
    return _alone(plan, num_steps, key, task_key, data)


def rollouts(
    problem: AlternatingProblem,
    policy: Policy,
    keys: jax.Array,
    data: Any,
    num_steps: int,
    *,
    dispatch: str = "mix",
    step_reward: StepReward | None = None,
    restart: Restart | None = None,
    early_stopping: bool = True,
    task_key: jax.Array | None = None,
    chunk: int = 500,
) -> tuple[EpisodeResult, Trajectory]:
    """Several runs at once, as `vmap(rollout)` over `keys` [S] but without its waste.

    With "switch" they follow one another, so that each step is that of its action.

    Args:
      problem: as in `rollout`, and so are the arguments that are not named here.
      policy: one for all runs.
      keys: [S].
      data: shared by all runs.
      num_steps: T.
      dispatch: as in `rollout`.
      step_reward: as in `rollout`.
      restart: as in `rollout`.
      early_stopping: as in `rollout`.
      task_key: one for all runs.
      chunk: as in `rollout`.

    Returns:
      As `rollout`, with a leading axis [S].
    """
    problem, data = _prepared(problem, data)
    plan = _plan(
        problem,
        policy,
        num_steps,
        chunk,
        dispatch=dispatch,
        early_stopping=early_stopping,
        step_reward=step_reward,
        restart=restart,
    )
    if dispatch == "switch":
        return jax.lax.map(
            lambda key: _alone(plan, num_steps, key, task_key, data), keys
        )
    begin = jax.vmap(lambda key: plan.begin(key, task_key, data))
    turn = jax.vmap(lambda i, run: plan.turn(i, run, data), in_axes=(None, 0))
    _, run = jax.lax.while_loop(
        lambda carry: jnp.any(_is_alive(carry[1].state, num_steps)),
        lambda carry: (carry[0] + 1, turn(*carry)),
        (jnp.int32(0), begin(keys)),
    )
    return jax.vmap(lambda run: plan.end(run, data))(run)


class _Run(NamedTuple):
    """A run and what it has left behind; the arrays are as long as it can become."""

    state: RunState
    key_act: jax.Array
    key_batch: jax.Array
    trajectory: Any
    checked: Any


class _Plan(NamedTuple):
    """How a run begins, goes on for a chunk, and ends."""

    begin: Callable[[jax.Array, jax.Array | None, Any], _Run]
    turn: Callable[[jax.Array, _Run, Any], _Run]
    end: Callable[[_Run, Any], tuple[EpisodeResult, Trajectory]]


def _alone(
    plan: _Plan, num_steps: int, key: jax.Array, task_key: jax.Array | None, data: Any
) -> tuple[EpisodeResult, Trajectory]:
    _, run = jax.lax.while_loop(
        lambda carry: _is_alive(carry[1].state, num_steps),
        lambda carry: (carry[0] + 1, plan.turn(*carry, data)),
        (jnp.int32(0), plan.begin(key, task_key, data)),
    )
    return plan.end(run, data)


def _plan(
    problem: AlternatingProblem, policy: Policy, num_steps: int, chunk: int, **how: Any
) -> _Plan:
    """The rest of the arguments are those of `episode`."""
    run_of = episode(problem, policy, num_steps=num_steps, **how)
    period = run_of.period
    blocks = max(1, min(chunk, num_steps) // period)
    length = blocks * period
    turns = -(-num_steps // length)

    def chunk_of(index: jax.Array, run: _Run, data: Any) -> tuple[RunState, Any, Any]:
        steps = index * length + jnp.arange(length)
        keys = [
            jax.vmap(lambda i, key=key: jax.random.fold_in(key, i))(steps)
            for key in (run.key_act, run.key_batch)
        ]
        if policy.draw is not None:
            keys[0] = jax.vmap(policy.draw)(keys[0])
        keys = [k.reshape(blocks, period, *k.shape[1:]) for k in keys]

        def advance(state: RunState, keys: Any, look: bool) -> tuple[RunState, Record]:
            return run_of.advance(state, *keys, data, look)

        def plain(state: RunState, keys: Any) -> tuple[RunState, Trajectory]:
            state, record = advance(state, keys, False)
            return state, _entry(record)

        def block(state: RunState, keys: Any) -> tuple[RunState, Any]:
            state, entries = jax.lax.scan(plain, state, [k[:-1] for k in keys])
            state, record = advance(state, [k[-1] for k in keys], True)
            entries = jax.tree.map(
                lambda many, one: jnp.concatenate([many, one[None]]),
                entries,
                _entry(record),
            )
            return state, (entries, record.checked)

        state, (entries, checked) = jax.lax.scan(block, run.state, keys)
        entries = jax.tree.map(lambda x: x.reshape(length, *x.shape[2:]), entries)
        return state, entries, checked

    def begin(key: jax.Array, task_key: jax.Array | None, data: Any) -> _Run:
        key_act, key_task = jax.random.split(key)
        key_init, key_batch = jax.random.split(
            key_task if task_key is None else task_key
        )
        state = run_of.prime(run_of.start(key_init), key_batch, data)
        run = _Run(state, key_act, key_batch, (), ())
        _, entries, checked = jax.eval_shape(chunk_of, jnp.int32(0), run, data)
        empty = lambda x: jnp.zeros((turns * x.shape[0], *x.shape[1:]), x.dtype)
        trajectory = jax.tree.map(empty, entries)
        return run._replace(
            trajectory=trajectory, checked=jnp.full_like(empty(checked), jnp.nan)
        )

    def turn(index: jax.Array, run: _Run, data: Any) -> _Run:
        state, entries, checked = chunk_of(index, run, data)

        def write(whole: jax.Array, part: jax.Array) -> jax.Array:
            at = index * part.shape[0]
            return jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0)

        return run._replace(
            state=state,
            trajectory=jax.tree.map(write, run.trajectory, entries),
            checked=write(run.checked, checked),
        )

    def end(run: _Run, data: Any) -> tuple[EpisodeResult, Trajectory]:
        every = run_of.validate_every // period
        num_checks = num_steps // run_of.validate_every
        metrics = run.checked[every - 1 :: every][:num_checks]
        result = _result(problem, run.state, metrics, data)
        return result, jax.tree.map(lambda x: x[:num_steps], run.trajectory)

    return _Plan(begin, turn, end)


def _result(
    problem: AlternatingProblem, state: RunState, metrics: jax.Array, data: Any
) -> EpisodeResult:
    # a metric that is not finite ends the run and is no check
    live = jnp.isfinite(metrics)
    unchecked = ~jnp.isfinite(state.best_metric)
    best_params = keep(unchecked, state.params, state.best_params)
    history, reached = metrics, live
    if problem.final_metric is not None:
        last = jnp.asarray(problem.final_metric(best_params, data), metrics.dtype)
        history, reached = jnp.append(metrics, last), jnp.append(live, True)
    # a reward may index its history, which is empty where no check was to come
    reward = problem.reward(history, reached) if history.size else jnp.asarray(jnp.nan)
    return EpisodeResult(
        params=state.params,
        optimizer_states=state.optimizer_states,
        best_params=best_params,
        best_metric=state.best_metric,
        best_step=state.best_step,
        metrics=metrics,
        metrics_live=live,
        reward=reward,
        num_steps=state.step,
        action_counts=state.action_counts,
        policy_state=state.policy_state,
        restarted=state.restarted,
        is_finite=state.is_finite,
    )


def _prepared(problem: AlternatingProblem, data: Any) -> tuple[AlternatingProblem, Any]:
    """A batch that never changes is drawn once, and travels beside the data."""
    if not problem.full_batch:
        return problem, data
    batch = problem.sample(data, jax.random.key(0))
    beside = lambda f: None if f is None else lambda params, data: f(params, data[0])
    observe = problem.observe
    problem = problem._replace(
        sample=lambda data, key: data[1],
        metric=beside(problem.metric),
        final_metric=beside(problem.final_metric),
        observe=observe and (lambda params, b, data: observe(params, b, data[0])),
    )
    return problem, (data, batch)


def _entry(record: Record) -> Trajectory:
    """Zeros where the run was over: what a policy says then is not finite, perhaps."""
    live = record.live
    return Trajectory(
        inputs=jnp.where(live, record.decision.inputs, 0),
        actions=jnp.where(live, record.decision.action, 0).astype(jnp.int8),
        log_probs=jnp.where(live, record.decision.log_prob, 0),
        rewards=record.reward,
        live=live,
    )


def _is_alive(state: RunState, num_steps: int) -> jax.Array:
    return ~state.done & (state.step < num_steps)
