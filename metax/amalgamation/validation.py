"""Judging a student without training it: over a dynamic length, and over a long one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.amalgamation.doors import check_student
from metax.amalgamation.policies import LearnedOptimizer
from metax.amalgamation.restarts import restarts
from metax.amalgamation.truncation import Optimizee, start_losses, student_objective
from metax.amalgamation.warmup import with_warmup
from metax.arguments import check_at_least
from metax.base import Task, check_key, inner_loop

__all__ = ["Gate", "long_horizon_gate", "validation_loss"]

Params = Any
Data = Any


class Gate(NamedTuple):
    """Whether a student survives the long horizon.

    Attributes:
      passed: bool, every run did.
      log_loss: [runs, steps // window], ln of the mean training loss of each window.
    """

    passed: jax.Array
    log_loss: jax.Array


def validation_loss(
    task: Task,
    student: LearnedOptimizer,
    *,
    truncation_length: int = 100,
    num_trajectories: int = 10,
    warmup_steps: int = 100,
    warmup_learning_rate: float = 0.01,
    random_scale: float = 3.0,
) -> Callable[[Params, jax.Array, Data, jax.Array], jax.Array]:
    """The mean log improvement of a student over whole unrolls, forward only.

    Each trajectory is a new optimizee, scaled and warmed up as in training; teachers do
    not count and do not run. The result is the mean L_meta over the truncations of all
    trajectories: comparable between weights, under one key. Memory is that of one step.

    Args:
      task: the optimizees.
      student: the learned optimizer.
      truncation_length: K of L_meta, at least 1.
      num_trajectories: at least 1.
      warmup_steps: at least 0.
      warmup_learning_rate: at least 0.
      random_scale: r of s = exp(U(-r, r)), at least 0.

    Returns:
      `validate(theta, key, data, unroll_length) -> scalar`, with `unroll_length` an
      int32, rounded down to whole truncations, at least one: a number that may change
      without a new compilation.

    Raises:
      ValueError: an argument outside its range.
    """
    name = "validation_loss"
    check_student(name, student)
    check_at_least(
        name, 1, truncation_length=truncation_length, num_trajectories=num_trajectories
    )
    check_at_least(
        name,
        0,
        warmup_steps=warmup_steps,
        warmup_learning_rate=warmup_learning_rate,
        random_scale=random_scale,
    )
    _, draw_anew = restarts(
        task,
        student,
        {},
        random_scale=random_scale,
        warmup_steps=warmup_steps,
        warmup_learning_rate=warmup_learning_rate,
        scaled_warmup=False,
    )
    improve = student_objective(task, student, lambda far: far, remat="none")

    def trajectory(
        theta: Params, key: jax.Array, data: Data, num: jax.Array
    ) -> jax.Array:
        key_restart, key_run = jax.random.split(key)
        fresh = draw_anew(theta, key_restart, data)
        start = Optimizee(
            params=fresh.params,
            student_state=fresh.student_state,
            scale=fresh.scale,
            keys=jax.random.split(key_run, truncation_length),
            trajectories={},
            key_noise=key_run,
            parts=jnp.array([1.0, 0.0]),
        )

        def truncation(i: jax.Array, carry: Any) -> Any:
            optimizee, total = carry
            keys = jax.random.split(jax.random.fold_in(key_run, i), truncation_length)
            _, (after, measured) = improve(theta, optimizee._replace(keys=keys), data)
            # the tree must not change: the keys are replaced at the next turn
            after = after._replace(keys=optimizee.keys)
            return after, total + measured.meta_loss

        total = jnp.zeros_like(start_losses(task, fresh.params, start.keys[:1], data))
        _, total = jax.lax.fori_loop(0, num, truncation, (start, total[0]))
        return total / num

    def validate(
        theta: Params, key: jax.Array, data: Data, unroll_length: jax.Array
    ) -> jax.Array:
        check_key(key, "validation_loss(...)(key=...)")
        num = jnp.maximum(jnp.asarray(unroll_length) // truncation_length, 1)
        keys = jax.random.split(key, num_trajectories)
        losses = jax.vmap(lambda k: trajectory(theta, k, data, num))(keys)
        return losses.mean()

    return validate


def long_horizon_gate(
    task: Task,
    student: LearnedOptimizer,
    *,
    steps: int = 10_000,
    runs: int = 3,
    window: int = 100,
    max_rise: float = 1.0,
    warmup_steps: int = 100,
    warmup_learning_rate: float = 0.01,
) -> Callable[[Params, jax.Array, Data], Gate]:
    """Runs a student far beyond its training, to see that it does not blow up.

    Many students look well over the horizon of their training and diverge after it,
    and validation does not foresee that. A run passes if every loss is finite and the
    last window's ln loss is at most `max_rise` above the lowest window's.

    Args:
      task: the optimizees; training data only.
      student: the learned optimizer.
      steps: of a run, warm-up included; 10 times the longest unroll is customary.
      runs: at least 1.
      window: steps that are averaged, at least 1; divides `steps`.
      max_rise: in ln loss, at least 0.
      warmup_steps: at least 0.
      warmup_learning_rate: at least 0.

    Returns:
      `gate(theta, key, data) -> Gate`.

    Raises:
      ValueError: an argument outside its range, or a window that does not divide.
    """
    name = "long_horizon_gate"
    check_student(name, student)
    check_at_least(name, 1, steps=steps, runs=runs, window=window)
    check_at_least(
        name,
        0,
        max_rise=max_rise,
        warmup_steps=warmup_steps,
        warmup_learning_rate=warmup_learning_rate,
    )
    if steps % window:
        raise ValueError(
            "`long_horizon_gate(window=...)` must divide `steps`; got "
            f"window={window}, steps={steps}."
        )

    def log_losses(theta: Params, key: jax.Array, data: Data) -> jax.Array:
        rule = with_warmup(student.rule(theta), warmup_steps, warmup_learning_rate)
        loop = inner_loop(task, rule)
        key_init, key_run = jax.random.split(key)

        def average(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            one = lambda state, key: loop.step(state, key, data)
            state, infos = jax.lax.scan(one, state, jax.random.split(key, window))
            return state, jnp.log(infos.loss.mean())

        keys = jax.random.split(key_run, steps // window)
        return jax.lax.scan(average, loop.init(key_init), keys)[1]

    def gate(theta: Params, key: jax.Array, data: Data) -> Gate:
        check_key(key, "long_horizon_gate(...)(key=...)")
        keys = jax.random.split(key, runs)
        far = jax.vmap(lambda k: log_losses(theta, k, data))(keys)
        # a mean of 0 is as good as it gets, and has an infinite logarithm
        fine = ~jnp.isnan(far) & (far < jnp.inf)
        rise = far[:, -1] - far.min(axis=1)
        risen = jnp.where(jnp.isnan(rise), 0, rise) > max_rise
        return Gate(jnp.all(fine) & ~jnp.any(risen), far)

    return gate
