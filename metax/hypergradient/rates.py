"""Arithmetic on learning rates: how they start, move, stay in range and are applied.

A learning rate is one scalar (scope `"global"`), a tree of scalars (`"leaf"`) or a tree
like the parameters (`"element"`), in at least float32: in bfloat16 a rate of 1e-3 would
lose every increment of 1e-6.
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "all_finite",
    "blend",
    "initial_rates",
    "limit",
    "move",
    "rate_dtype",
    "scale",
    "select",
]


def initial_rates(learning_rate: Any, params: Any, scope: str) -> Any:
    """Spreads α_0 over the scope, in fresh buffers: nothing here may be shared."""
    if scope == "global":
        return jnp.array(learning_rate, rate_dtype())
    if scope == "leaf":
        return jax.tree.map(lambda _: jnp.array(learning_rate, rate_dtype()), params)
    return jax.tree.map(
        lambda p: jnp.full(jnp.shape(p), learning_rate, rate_dtype(p)), params
    )


def move(alpha: Any, u: Any, rule: str) -> Any:
    """Takes the step u: α (1 + u) if `rule` is multiplicative, else α + u."""

    def step(a: jax.Array, x: jax.Array) -> jax.Array:
        x = x.astype(a.dtype)
        return a * (1 + x) if rule == "multiplicative" else a + x

    return jax.tree.map(step, alpha, u)


def limit(proposed: Any, previous: Any, max_relative_change: Any, bounds: Any) -> Any:
    """Keeps a learning rate near its last value, then within its bounds.

        α ← clip(α, α_prev − c|α_prev|, α_prev + c|α_prev|);   α ← clip(α, lo, hi)

    Args:
      proposed: the rates to limit, a pytree.
      previous: the rates of the last step, the same tree.
      max_relative_change: c > 0, or None for no limit.
      bounds: a pair (lo, hi), either of which may be None, or None.

    Returns:
      A tree like `proposed`.
    """

    def clip(new: jax.Array, old: jax.Array) -> jax.Array:
        if max_relative_change is not None:
            reach = jnp.asarray(max_relative_change, new.dtype) * jnp.abs(old)
            new = jnp.clip(new, old - reach, old + reach)
        if bounds is not None:
            lo, hi = (None if b is None else jnp.asarray(b, new.dtype) for b in bounds)
            new = jnp.clip(new, lo, hi)
        return new

    return jax.tree.map(clip, proposed, previous)


def blend(alpha: Any, transition: tuple[Any, Any], count: jax.Array) -> Any:
    """Goes over to a fixed rate: γ = δ α + (1 − δ) α_∞ with δ = delta(count)."""
    delta, final = transition

    def mix(a: jax.Array) -> jax.Array:
        weight = jnp.asarray(delta(count), a.dtype)
        return weight * a + (1 - weight) * jnp.asarray(final, a.dtype)

    return jax.tree.map(mix, alpha)


def scale(d: Any, gamma: Any, scope: str) -> Any:
    """Computes −γ d in at least float32, each leaf returned in its own dtype."""

    def product(leaf: jax.Array, rate: jax.Array) -> jax.Array:
        return (-rate.astype(rate_dtype(leaf)) * leaf).astype(leaf.dtype)

    if scope == "global":
        return jax.tree.map(lambda leaf: product(leaf, gamma), d)
    return jax.tree.map(product, d, gamma)


def select(condition: Any, new: Any, old: Any) -> Any:
    """Takes `new` where the condition holds, else `old`, in the dtypes of `old`."""

    def choose(x: Any, y: jax.Array) -> jax.Array:
        return jnp.where(condition, jnp.asarray(x, y.dtype), y)

    return jax.tree.map(choose, new, old)


def all_finite(*trees: Any) -> jax.Array:
    """Tells whether every entry of every leaf is finite, as one bool scalar."""
    # 0·x is NaN unless x is finite, and a sum of floats is one pass without the
    # temporary of booleans that `jnp.all(jnp.isfinite(x))` costs.
    sums = [jnp.sum(0.0 * leaf) for leaf in jax.tree.leaves(trees)]
    return jnp.isfinite(sum(sums, start=jnp.zeros(())))


def rate_dtype(leaf: Any = None) -> Any:
    """The dtype of learning rates: at least float32, however narrow the parameters.

    Args:
      leaf: None for rates that belong to no single leaf (float64 where x64 is
        enabled), or the parameter whose elements the rates belong to.

    Returns:
      A real floating dtype.
    """
    if leaf is None:
        return jnp.promote_types(jnp.float32, jnp.result_type(float))
    return jnp.promote_types(jnp.float32, jnp.finfo(leaf.dtype).dtype)
