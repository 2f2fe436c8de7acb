"""Small tasks and learned optimizers of few weights, which compile in no time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metax import Task
from metax.amalgamation import LearnedOptimizer


def plain_task(loss: Callable[[Any], jax.Array], start: Any = 1.0) -> Task:
    """A loss without data, from one place."""
    return Task(
        init=lambda key: jax.tree.map(jnp.asarray, start),
        loss=lambda params, batch, key: loss(params),
        sample=lambda data, key: (),
        evaluate=lambda params, data: {},
    )


def network(drawn: int | None = None) -> Task:
    """Least squares by two layers, on all rows of (x [n, 2], y [n]) or on some."""

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        hidden = jnp.tanh(batch[0] @ params["first"])
        return jnp.mean((hidden @ params["second"] - batch[1]) ** 2)

    def init(key: jax.Array) -> Any:
        key_first, key_second = jax.random.split(key)
        return {
            "first": jax.random.normal(key_first, (2, 3)),
            "second": jax.random.normal(key_second, (3,)),
        }

    def sample(data: Any, key: jax.Array) -> Any:
        if drawn is None:
            return data
        some = lambda leaf: jax.random.choice(key, leaf, (drawn,), axis=0)
        return jax.tree.map(some, data)

    return Task(init, loss, sample, lambda params, data: {})


def rows() -> tuple[jax.Array, jax.Array]:
    """Data for `network`."""
    x = jax.random.normal(jax.random.key(3), (12, 2))
    return x, jnp.sin(2 * x[:, 0]) + x[:, 1]


def descent(log_rate: float = -2.0, decay: float = 0.0) -> LearnedOptimizer:
    """SGD of two weights: the step is exp(log_rate) / (1 + decay · t) · gradient."""

    def rule(theta: Any) -> optax.GradientTransformationExtraArgs:
        def update(
            grads: Any, count: jax.Array, params: Any = None, **extra: Any
        ) -> tuple[Any, jax.Array]:
            rate = jnp.exp(theta["log_rate"]) / (1 + theta["decay"] * count)
            return jax.tree.map(lambda g: -rate * g, grads), count + 1

        init = lambda params: jnp.zeros((), jnp.int32)
        return optax.GradientTransformationExtraArgs(init, update)

    def init(key: jax.Array) -> Any:
        number = lambda value: jnp.full((), value, float)
        return {"log_rate": number(log_rate), "decay": number(decay)}

    return LearnedOptimizer(init, rule)


def walking(weight: float = 1.0) -> LearnedOptimizer:
    """One weight w: whatever the gradient, a step of -w in every coordinate."""

    def rule(theta: Any) -> optax.GradientTransformationExtraArgs:
        def update(
            grads: Any, count: jax.Array, params: Any = None, **extra: Any
        ) -> tuple[Any, jax.Array]:
            return jax.tree.map(lambda g: 0 * g - theta["w"][0], grads), count + 1

        init = lambda params: jnp.zeros((), jnp.int32)
        return optax.GradientTransformationExtraArgs(init, update)

    return LearnedOptimizer(lambda key: {"w": jnp.full(1, weight)}, rule)


def keep_gradients() -> optax.GradientTransformation:
    """A meta-optimizer that sums the gradients in its state and moves nothing."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optax.tree.zeros_like(grads), jax.tree.map(jnp.add, state, grads)

    return optax.GradientTransformation(optax.tree.zeros_like, update)
