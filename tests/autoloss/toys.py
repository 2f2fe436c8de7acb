"""Small alternating problems with answers that can be written down."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metax import Action, AlternatingProblem


def best_reward(history: jax.Array, live: jax.Array) -> jax.Array:
    """Minus the least metric."""
    return -jnp.min(jnp.where(live, history, jnp.inf), initial=jnp.inf)


def two_groups(**changes: Any) -> AlternatingProblem:
    """Two groups and three actions: one on each, one on both; noisy batches."""

    def init(key: jax.Array) -> dict[str, Any]:
        key_a, key_b = jax.random.split(key)
        a, b = jax.random.normal(key_a, (3,)), jax.random.normal(key_b, (2, 2))
        return {"a": a, "b": {"w": b}}

    def first(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum((params["a"] - batch) ** 2) + jnp.sum(params["b"]["w"] ** 4)

    def second(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        noise = 0.1 * jax.random.normal(key, (2, 2))
        return jnp.sum((params["b"]["w"] + noise) ** 2) * jnp.mean(params["a"] ** 2)

    problem = AlternatingProblem(
        init=init,
        losses=(first, second),
        actions=(Action(0, "a"), Action(1, ("b",)), Action(0)),
        optimizers=optax.adam(0.05),
        sample=lambda data, key: data["train"] + 0.1 * jax.random.normal(key, (3,)),
        metric=lambda params, data: jnp.sum((params["a"] - data["valid"]) ** 2),
        reward=best_reward,
        validate_every=5,
        names=("fit", "shrink"),
    )
    return problem._replace(**changes)


def two_groups_data() -> dict[str, jax.Array]:
    return {"train": jnp.arange(3.0), "valid": jnp.arange(3.0) + 0.1}


def bandit(**changes: Any) -> AlternatingProblem:
    """One number: action 0 pulls it to 1, which is good, action 1 to -1."""
    problem = AlternatingProblem(
        init=lambda key: {"x": jnp.zeros(())},
        losses=(
            lambda p, batch, key: (p["x"] - 1) ** 2,
            lambda p, batch, key: (p["x"] + 1) ** 2,
        ),
        actions=(Action(0), Action(1)),
        optimizers=optax.sgd(0.1),
        sample=lambda data, key: data,
        metric=lambda params, data: params["x"] * data,
        maximize=True,
        validate_every=1,
    )
    return problem._replace(**changes)
