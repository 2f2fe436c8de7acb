"""The checks at the public doors: what an alternating problem must hold to be run."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from metax.arguments import check_count, check_has, check_one_of
from metax.autoloss.dispatching import groups_of
from metax.base import AlternatingProblem, check_key

__all__ = ["check_alternating", "check_problem", "check_rollout", "check_rules"]

MOST_ACTIONS = 127  # a trajectory keeps them as int8


def check_rollout(
    problem: AlternatingProblem,
    function: str,
    num_steps: int,
    dispatch: str,
    validate_every: int | None = None,
    chunk: int = 1,
) -> None:
    """Refuses what no run can be made of.

    Args:
      problem: what is to be run.
      function: the public name that was called.
      num_steps: at least 1.
      dispatch: "mix" or "switch".
      validate_every: None, or at least 1.
      chunk: at least 1.

    Raises:
      ValueError: naming function and argument, the rule and the value.
    """
    check_one_of(function, "dispatch", dispatch, ("mix", "switch"))
    check_count(function, 1, num_steps=num_steps, chunk=chunk)
    if validate_every is not None:
        check_count(function, 1, validate_every=validate_every)
    check_problem(problem, function)
    repeats = tuple(action.repeats for action in problem.actions)
    if dispatch == "mix" and len(set(repeats)) > 1:
        raise ValueError(
            f"`{function}(dispatch='mix')` needs the same `repeats` in every action; "
            f"got repeats={repeats}; use dispatch='switch'."
        )


def check_alternating(function: str, problem: Any) -> None:
    """Refuses what is no alternating problem."""
    what = "an `AlternatingProblem`"
    check_has(function, "problem", problem, what, "init", "losses", "actions")


def check_rules(
    function: str,
    policy: Any = None,
    step_reward: Any = None,
    restart: Any = None,
    task_key: Any = None,
) -> None:
    """Refuses parts of a run that are something else; None is not looked at."""
    parts: tuple[tuple[str, Any, str, tuple[str, ...]], ...] = (
        ("policy", policy, "a `Policy`", ("init", "act", "observe")),
        ("step_reward", step_reward, "a `StepReward`", ("init", "update")),
        ("restart", restart, "a `Restart`", ("init", "update", "penalty")),
    )
    for name, part, what, fields in parts:
        if part is not None:
            check_has(function, name, part, what, *fields)
    if task_key is not None:
        check_key(task_key, f"{function}(task_key=...)")


def check_problem(problem: AlternatingProblem, function: str) -> None:
    """Refuses a problem whose parts do not fit each other."""
    check_alternating(function, problem)
    groups = _groups(problem, function)
    _check_actions(problem, function, groups)
    _check_optimizers(problem, function, groups)
    _check_numbers(problem, function)
    _check_direction(problem, function)


def _groups(problem: AlternatingProblem, function: str) -> dict[str, Any]:
    """The shapes of the groups; nothing is computed."""
    groups = jax.eval_shape(problem.init, jax.random.key(0))
    if not isinstance(groups, dict) or not groups:
        _refuse(function, "init", "must return a dict of named groups", type(groups))
    return groups


def _check_actions(problem: AlternatingProblem, function: str, groups: Any) -> None:
    count = len(problem.losses)
    if not 1 <= len(problem.actions) <= MOST_ACTIONS:
        rule = f"must hold 1 to {MOST_ACTIONS} actions"
        _refuse(function, "actions", rule, len(problem.actions))
    for q, action in enumerate(problem.actions):
        named = action.params
        names = (named,) if isinstance(named, str) else named
        unknown = [name for name in names or () if name not in groups]
        where = f"actions[{q}]"
        if not 0 <= action.loss < count:
            rule = f"must name one of the {count} losses, from 0"
            _refuse(function, f"{where}.loss", rule, action.loss)
        if unknown or not groups_of(problem, groups, q):
            rule = f"must name groups among {sorted(groups)}"
            _refuse(function, f"{where}.params", rule, unknown or named)
        if action.repeats < 1:
            _refuse(function, f"{where}.repeats", "must be at least 1", action.repeats)


def _check_optimizers(problem: AlternatingProblem, function: str, groups: Any) -> None:
    sharing = problem.optimizer_sharing
    if sharing not in ("variable", "action"):
        rule = 'must be "variable" or "action"'
        _refuse(function, "optimizer_sharing", rule, repr(sharing))
    rules = problem.optimizers
    if isinstance(rules, optax.GradientTransformation):
        return
    if not isinstance(rules, Mapping):
        rule = "must be an optax rule or a mapping to rules"
        _refuse(function, "optimizers", rule, type(rules).__name__)
    by_group = sharing == "variable"
    wanted = set(groups) if by_group else set(range(len(problem.actions)))
    missing, extra = wanted - set(rules), set(rules) - wanted
    if missing or extra:
        owners = "groups" if by_group else "indices of actions"
        got = f"missing {sorted(missing)}, extra {sorted(map(str, extra))}"
        _refuse(function, "optimizers", f"must have the {owners} as keys", got)


def _check_numbers(problem: AlternatingProblem, function: str) -> None:
    if problem.validate_every < 1:
        rule = "must be at least 1"
        _refuse(function, "validate_every", rule, problem.validate_every)
    if problem.patience is not None and problem.patience < 0:
        rule = "must be at least 0, or None"
        _refuse(function, "patience", rule, problem.patience)
    if not 0 <= problem.metric_decay < 1:
        rule = "must lie in [0, 1)"
        _refuse(function, "metric_decay", rule, problem.metric_decay)
    if problem.names and len(problem.names) != len(problem.losses):
        rule = f"must be empty or name all {len(problem.losses)} losses"
        _refuse(function, "names", rule, problem.names)
    if not isinstance(problem.maximize, bool):
        # a metric without a direction cannot be followed
        _refuse(function, "maximize", "must be True or False", problem.maximize)


def _check_direction(problem: AlternatingProblem, function: str) -> None:
    """Tries the reward on one entry, .7 and then .8: larger must be better."""
    with jax.ensure_compile_time_eval():
        live = jnp.ones(1, bool)
        tried = [problem.reward(jnp.full(1, x), live) for x in (0.7, 0.8)]
        if any(isinstance(reward, jax.core.Tracer) for reward in tried):
            return
        before, after = map(float, tried)
    if after < before if problem.maximize else after > before:
        raise ValueError(
            f"`{function}(problem.reward=...)` must grow where the metric gets better "
            f"(maximize={problem.maximize}); got {before:.6g} for a metric of "
            f"0.7 and {after:.6g} for 0.8. Give the problem a reward of its own."
        )


def _refuse(function: str, field: str, rule: str, got: Any) -> None:
    raise ValueError(f"`{function}(problem.{field}=...)` {rule}; got {got}.")
