"""New optimizees: parameters, a random scale, and a warm-up of plain SGD."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation.policies import LearnedOptimizer
from metax.amalgamation.truncation import draw
from metax.base import Task, truncate

__all__ = ["Restart", "draw_scale", "restarts", "warm_up"]

Params = Any
Data = Any


class Restart(NamedTuple):
    """What is new at the start of an unroll: fields of `AmalgamationState`."""

    params: Params
    student_state: Any
    teacher_params: dict[str, Params]
    teacher_states: dict[str, Any]
    scale: Params


def draw_scale(params: Params, random_scale: Any, key: jax.Array) -> Params:
    """s = exp(U(-r, r)) for every scalar parameter, a tree like `params`."""
    keys = optax.tree.split_key_like(key, params)
    uniform = lambda p, k: jax.random.uniform(k, p.shape, p.dtype, -1, 1)
    spread = lambda p, k: jnp.exp(random_scale * uniform(p, k)).astype(p.dtype)
    return jax.tree.map(spread, params, keys)


def warm_up(
    task: Task,
    rules: Sequence[tuple[optax.GradientTransformationExtraArgs, Params | None]],
    params: Params,
    states: tuple[Any, ...],
    keys: jax.Array,
    data: Data,
    learning_rate: Any,
    rate_scale: Params,
) -> tuple[Params, tuple[Any, ...]]:
    """Steps of SGD during which every rule sees the gradients and moves nothing.

        θ ← θ - learning_rate · rate_scale ∘ ∇M(x_i, θ)

    Args:
      task: the optimizee.
      rules: each with its scale s: it sees s ∘ ∇M, and θ/s as parameters; None for
        rules that work in true coordinates.
      params: where to start, in true coordinates.
      states: the state of each rule.
      keys: [steps].
      data: of the task.
      learning_rate: of the SGD.
      rate_scale: multiplies the rate at each coordinate.

    Returns:
      The parameters and the states after it.
    """
    times = lambda a, b: jax.tree.map(jnp.multiply, a, b)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, states = carry
        batch, key_loss = draw(task, data, key)
        value_fn = lambda params: task.loss(params, batch, key_loss)
        value, grad = jax.value_and_grad(value_fn)(params)
        # what `inner_loop` hands on, for rules that look at the objective themselves
        extra = {"value": value, "grad": grad, "value_fn": value_fn}
        new = []
        for (rule, scale), state in zip(rules, states, strict=True):
            if scale is None:
                _, after = rule.update(grad, state, params, warmup=True, **extra)
            else:
                seen = jax.tree.map(jnp.divide, params, scale)
                _, after = rule.update(times(scale, grad), state, seen, warmup=True)
            new.append(after)
        moved = jax.tree.map(
            lambda p, s, g: (p - learning_rate * s * g).astype(p.dtype),
            params,
            rate_scale,
            grad,
        )
        if task.carry is not None:
            moved = task.carry(moved, params, batch, key_loss)
        return (moved, tuple(new)), None

    carry, _ = jax.lax.scan(step, (params, states), keys)
    return truncate(carry)


def restarts(
    task: Task,
    student: LearnedOptimizer,
    teachers: Mapping[str, optax.GradientTransformation],
    *,
    random_scale: Any,
    warmup_steps: int,
    warmup_learning_rate: Any,
    scaled_warmup: bool,
) -> tuple[Callable[..., Restart], Callable[..., Restart]]:
    """How one optimizee begins.

    Args:
      task: the optimizee.
      student: its weights enter through the shapes of its state alone.
      teachers: they begin where the student begins, in true coordinates.
      random_scale: r of `draw_scale`.
      warmup_steps: of SGD.
      warmup_learning_rate: of SGD.
      scaled_warmup: whether it runs on θ/s, that is at rate · s² in θ.

    Returns:
      `begin(theta, key)`, before any data, and `draw_anew(theta, key, data)`, warmed
      up; equal in trees, shapes and dtypes.
    """
    wrapped = {n: optax.with_extra_args_support(rule) for n, rule in teachers.items()}

    def begin(theta: Params, key: jax.Array) -> Restart:
        key_params, key_scale = jax.random.split(key)
        params = task.init(key_params)
        return Restart(
            params=params,
            student_state=student.rule(theta).init(params),
            # copies: an array that stands twice in a state cannot be donated
            teacher_params={name: jax.tree.map(jnp.copy, params) for name in wrapped},
            teacher_states={name: rule.init(params) for name, rule in wrapped.items()},
            scale=draw_scale(params, random_scale, key_scale),
        )

    def draw_anew(theta: Params, key: jax.Array, data: Data) -> Restart:
        key_begin, key_warm = jax.random.split(key)
        fresh = begin(theta, key_begin)
        ones = jax.tree.map(jnp.ones_like, fresh.scale)
        rate_scale = jax.tree.map(jnp.square, fresh.scale) if scaled_warmup else ones
        rules: list[Any] = [(student.rule(theta), fresh.scale)]
        rules += [(rule, None) for rule in wrapped.values()]
        states = (fresh.student_state, *fresh.teacher_states.values())
        keys = jax.random.split(key_warm, warmup_steps)
        how = (keys, data, warmup_learning_rate, rate_scale)
        params, (own, *theirs) = warm_up(task, rules, fresh.params, states, *how)
        return fresh._replace(
            params=params,
            student_state=own,
            teacher_params=dict.fromkeys(wrapped, params),
            teacher_states=dict(zip(fresh.teacher_states, theirs, strict=True)),
        )

    return begin, draw_anew
