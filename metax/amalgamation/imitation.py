"""Off-policy imitation: a student regresses the updates of one teacher."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation.coordinates import features_dtype, flatten
from metax.amalgamation.doors import check_differentiable_student, check_student
from metax.amalgamation.estimators import Carry, bptt, over_tasks
from metax.amalgamation.policies import LearnedOptimizer
from metax.amalgamation.restarts import Restart, restarts
from metax.amalgamation.states import (
    DUE,
    AmalgamationInfo,
    AmalgamationState,
    default_meta_optimizer,
    meta_update,
    show,
)
from metax.amalgamation.truncation import Measured, Optimizee, draw, scan_steps
from metax.arguments import check_at_least, check_rule
from metax.base import Loop, Task, check_key, truncate

__all__ = ["imitate"]

Params = Any
Data = Any
FLOOR = 1e-10  # under the logarithm of the info's distances


def imitate(
    task: Task,
    student: LearnedOptimizer,
    teacher: optax.GradientTransformation,
    *,
    truncation_length: int = 20,
    unroll_length: int = 100,
    num_tasks: int = 1,
    random_scale: float = 0.0,
    meta_optimizer: optax.GradientTransformation | None = None,
) -> Loop:
    """Trains a learned optimizer to make the steps of a teacher, on its trajectory.

        θ_{i+1} = θ_i + u_i                  the teacher's update of g_i = ∇M(x_i, θ_i)
        L = (1/K) Σ_i ½ mean_j (v_i - u_i)²  v_i the student's of the same g_i

    The student never moves anything: it sees the teacher's gradients, and its state
    goes on along them. In the stronger baselines such a step stands in place of a meta
    step with some probability: draw it in the caller, carry `theta` and `meta_state`
    from one loop's state to the other's by `state._replace`.

    Cost of a step: a gradient of the task and three passes of the student.

    Args:
      task: what the optimizees are.
      student: the learned optimizer.
      teacher: any optax rule, `optax.adam(0.01)` in the paper; not differentiated.
      truncation_length: K, at least 1; divides `unroll_length`.
      unroll_length: steps of an optimizee.
      num_tasks: B, optimizees side by side.
      random_scale: each coordinate is scaled by s = exp(U(-r, r)) for the student.
      meta_optimizer: default `chain(clip_by_weight_norm(0.1, 1e-3), adam(1e-3))`.

    Returns:
      A `Loop` with `AmalgamationState`, whose `params` are the teacher's, and
      `AmalgamationInfo`: `imitation_loss` is the objective, `meta_loss` is 0, and
      `distances["teacher"]` is the mean logarithm of its terms.

    Raises:
      ValueError: an argument outside its range, lengths that do not divide, or a
        student without a finite derivative.

    Reference:
      Chen et al., Training Stronger Baselines for Learning to Optimize, 2020,
      arXiv:2010.09089, section 3.2.
    """
    _check(truncation_length, unroll_length, num_tasks, random_scale)
    check_student("imitate", student)
    check_rule("imitate", "teacher", teacher)
    if meta_optimizer is not None:
        check_rule("imitate", "meta_optimizer", meta_optimizer)
    check_differentiable_student(student, "imitate(student=...)")
    if meta_optimizer is None:
        meta_optimizer = default_meta_optimizer()
    rule = optax.with_extra_args_support(teacher)
    begin, draw_anew = restarts(
        task,
        student,
        {"teacher": rule},
        random_scale=random_scale,
        warmup_steps=0,
        warmup_learning_rate=0.0,
        scaled_warmup=False,
    )

    def follow(params: Params, state: Any, keys: jax.Array, data: Data) -> Any:
        """The teacher's run: where it ends, and what it saw and did at each step."""

        def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
            params, state = carry
            batch, key_loss = draw(task, data, key)
            value_fn = lambda params: task.loss(params, batch, key_loss)
            value, grad = jax.value_and_grad(value_fn)(params)
            extra = {"value": value, "grad": grad, "value_fn": value_fn}
            updates, state = rule.update(grad, state, params, **extra)
            moved = optax.apply_updates(params, updates)
            if task.carry is not None:
                moved = task.carry(moved, params, batch, key_loss)
            seen = {"params": params, "grad": grad, "updates": updates, "loss": value}
            return (moved, state), seen

        return truncate(jax.lax.scan(step, (params, state), keys))

    def regress(theta: Params, fixed: Optimizee) -> tuple[jax.Array, Any]:
        """The objective of one optimizee, whose trajectory is already there."""
        own = student.rule(theta)

        def step(state: Any, seen: dict[str, Any]) -> tuple[Any, jax.Array]:
            grad = jax.tree.map(jnp.multiply, fixed.scale, seen["grad"])
            params = jax.tree.map(jnp.divide, seen["params"], fixed.scale)
            updates, state = own.update(grad, state, params)
            updates = jax.tree.map(jnp.multiply, fixed.scale, updates)
            miss = jax.tree.map(jnp.subtract, updates, seen["updates"])
            return state, 0.5 * jnp.mean(flatten(miss, features_dtype(miss)) ** 2)

        seen = fixed.trajectories
        state, misses = scan_steps(step, fixed.student_state, seen, "step")
        loss, num = misses.mean(), len(misses)
        measured = Measured(
            loss=loss,
            meta_loss=jnp.zeros_like(loss),
            imitation_loss=loss,
            inner_losses=seen["loss"],
            distances=jnp.log(misses + FLOOR)[:, None],
            counted=jnp.ones(num, bool),
        )
        return loss, (fixed._replace(student_state=state), measured)

    def fields(fresh: Restart) -> dict[str, Any]:
        return {**fresh._asdict(), "estimator_state": ()}

    def init(key: jax.Array) -> AmalgamationState:
        check_key(key, "imitate(...).init(key=...)")
        key_theta, key_tasks = jax.random.split(key)
        theta = student.init(key_theta)
        fresh = over_tasks(begin)(theta, jax.random.split(key_tasks, num_tasks))
        return AmalgamationState(
            theta=theta,
            meta_state=meta_optimizer.init(theta),
            inner_step=jnp.array(DUE, jnp.int32),
            count=jnp.zeros((), jnp.int32),
            imitation_weight=jnp.ones((), jnp.float32),
            unroll_length=jnp.array(unroll_length, jnp.int32),
            **fields(fresh),
        )

    def renew(state: AmalgamationState, key: jax.Array, data: Data) -> Any:
        keys = jax.random.split(key, num_tasks)
        fresh = over_tasks(draw_anew, (None, 0, None))(state.theta, keys, data)
        return state._replace(inner_step=jnp.zeros((), jnp.int32), **fields(fresh))

    def step(
        state: AmalgamationState, key: jax.Array, data: Data
    ) -> tuple[AmalgamationState, AmalgamationInfo]:
        check_key(key, "imitate(...).step(key=...)")
        key_restart, key_run = jax.random.split(key)
        due = state.inner_step >= state.unroll_length
        state = jax.lax.cond(
            due, lambda: renew(state, key_restart, data), lambda: state
        )
        keys = jax.vmap(lambda k: jax.random.split(k, truncation_length))(
            jax.random.split(key_run, num_tasks)
        )
        (params, teacher_state), seen = over_tasks(follow, (0, 0, 0, None))(
            state.teacher_params["teacher"], state.teacher_states["teacher"], keys, data
        )
        parts = jnp.broadcast_to(jnp.array([0.0, 1.0]), (num_tasks, 2))
        optimizees = Optimizee(
            params, state.student_state, state.scale, keys, seen, keys[:, 0], parts
        )
        theta = state.theta
        gradient, carry, (loss, measured) = bptt(
            regress, theta, Carry(optimizees, ()), key_run
        )
        state, is_finite = meta_update(meta_optimizer, state, gradient, loss)
        length = state.inner_step + truncation_length
        state = state._replace(
            params=params,
            student_state=carry.optimizees.student_state,
            teacher_params={"teacher": jax.tree.map(jnp.copy, params)},
            teacher_states={"teacher": teacher_state},
            inner_step=jnp.where(is_finite, length, DUE).astype(jnp.int32),
        )
        shown = show(measured, loss, gradient, theta, ["teacher"], jnp.log(FLOOR))
        return truncate(state), shown._replace(restarted=due, is_finite=is_finite)

    return Loop(init, step)


def _check(length: int, unroll_length: int, num_tasks: int, scale: Any) -> None:
    check_at_least(
        "imitate",
        1,
        truncation_length=length,
        unroll_length=unroll_length,
        num_tasks=num_tasks,
    )
    check_at_least("imitate", 0, random_scale=scale)
    if unroll_length % length:
        raise ValueError(
            "`imitate(truncation_length=...)` must divide `unroll_length`; got "
            f"truncation_length={length}, unroll_length={unroll_length}."
        )
